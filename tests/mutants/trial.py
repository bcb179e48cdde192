"""A mutant against the tests of its stratum, in a copy of the repository."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
NOTICED, LEFT, TIMED_OUT = "noticed", "left", "timed out"
# Imported once, and shared by all processes that test. Not Triton: that it interprets is settled when it is imported.
PRELOADED = ["numpy", "torch", "pytest"]


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    verdict: NOTICED, LEFT or TIMED_OUT.
    by: the test that failed, or what else ended the tests.
    """

    verdict: str
    by: str
    seconds: float


def make_copy(directory: Path) -> Path:
    """All files that git knows or would add, as they are, and the extensions, as they were built."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    built = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "ditq_kernels").glob("*.so")]
    for name in filter(None, [*names, *built]):
        source, target = REPOSITORY / name, directory / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return directory


def _test(copy: str, tests: list[str], log: str) -> None:
    """Runs the tests of ``copy``, with the package as it is there; ends this process with pytest's exit code."""
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(copy)
    sys.path[:0] = [copy, f"{copy}/tests"]
    os.environ["PYTHONPATH"] = copy  # for the processes that tests start
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(int(code))


def run_tests(copy: Path, tests: tuple[str, ...], limit: float) -> Outcome:
    """The outcome of the tests of ``copy`` as it is, all of them if none fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log = copy.with_suffix(".log")
    files = [f"tests/test_{name}.py" for name in tests]
    started = time.monotonic()
    process = context.Process(target=_test, args=(str(copy), files, str(log)))
    process.start()
    process.join(limit)
    timed_out = process.exitcode is None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    took = time.monotonic() - started
    if timed_out:
        return Outcome(TIMED_OUT, f"{limit:.0f} s", took)
    text = log.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", text, re.M)
    if process.exitcode == 0:
        return Outcome(LEFT, "", took)
    if process.exitcode == 1 or failed:
        return Outcome(NOTICED, failed[0] if failed else "", took)
    return Outcome(NOTICED, f"exit code {process.exitcode}", took)


def _forget_bytecode(path: Path) -> None:
    """It is told from its source's by size and second, which are often the same for a mutant."""
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        cached.unlink()


def try_mutant(copy: Path, mutant: Mutant, tests: tuple[str, ...], limit: float) -> Outcome:
    """The outcome with the mutant in place, which is taken out of ``copy`` again."""
    path = copy / "ditq_kernels" / mutant.file
    original = path.read_text()
    try:
        path.write_text(mutant.text)
        _forget_bytecode(path)
        return run_tests(copy, tests, limit)
    finally:
        path.write_text(original)
        _forget_bytecode(path)
