"""The distribution of many pictures: ``ditq evaluate`` as a user would call it, its results kept with the records."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .. import MODEL_DIRECTORY

NAME = "distribution.json"  # a copy of the evaluation's results.json
SCHEMES = ("w4a8_g128", "w8a8_static")
SAMPLES, STEPS = 5000, 20
EVALUATION = Path("out/distribution")


def command(out: Path = EVALUATION) -> list[str]:
    """The arguments of ``ditq``."""
    source = os.path.relpath(MODEL_DIRECTORY)
    numbers = ["--samples", str(SAMPLES), "--steps", str(STEPS)]
    return ["evaluate", source, "--schemes", *SCHEMES, *numbers, "--out", str(out)]


def carry_out(directory: Path) -> None:
    """Draw what :data:`EVALUATION` lacks, judge it, and keep the results in ``directory``.

    Raises:
        subprocess.CalledProcessError: if the evaluation fails; it has said why.
    """
    subprocess.run([sys.executable, "-m", "ditq_kernels", *command()], check=True)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(EVALUATION / "results.json", directory / NAME)
