"""Which revision of this repository runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
COMMIT_VARIABLE = "DITQ_COMMIT"


def output_of(*command: str) -> str | None:
    """What a command prints, run in the repository; None if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=REPOSITORY)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str | None:
    """The checked-out commit, with "+" if files differ from it; outside a repository what ``DITQ_COMMIT`` says, for
    copies of a working tree, or None.
    """
    head = output_of("git", "rev-parse", "HEAD")
    if head is None:
        return os.environ.get(COMMIT_VARIABLE)
    return head + ("+" if output_of("git", "status", "--porcelain") else "")
