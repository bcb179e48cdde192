"""The tests that run kernels, by several processes at once: on a GPU, compiling is what takes their time.

    python3 benchmarks/gpu_tests.py [PROCESSES]

Needs pytest alone. Each process takes a part of the tests (``DITQ_TESTS_PART``, tests/conftest.py), and they share the
cache of what is compiled. The last line is the sum of what they say; the exit code is 1 if one of them failed.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 8
# Options of the project's that ask for a plugin are not wanted here.
OPTIONS = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-rfE", "-m", "on_device")
NO_TESTS = 5  # pytest's exit code where a part is empty


def command() -> list[str]:
    return [sys.executable, "-m", "pytest", *OPTIONS, str(REPOSITORY / "tests")]


def summed(texts: list[str]) -> str:
    """The counts of pytest's last lines, added up."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        lines = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
        for count, word in re.findall(r"(\d+) ([a-z]+)", lines[-1].split(" in ")[0] if lines else ""):
            counts[word.rstrip("s") if word == "errors" else word] += int(count)
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "no process told a result"


def main(processes: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{part}.log" for part in range(processes)]
        running = []
        for part, log in enumerate(logs):
            with log.open("w") as output:
                environment = os.environ | {"DITQ_TESTS_PART": f"{part}/{processes}"}
                running.append(
                    subprocess.Popen(command(), cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
                )
        try:
            codes = [process.wait() for process in running]
        except KeyboardInterrupt:  # out of time: the parts say what has failed so far
            for process in running:
                process.send_signal(signal.SIGINT)
            codes = [process.wait() for process in running]
        texts = [log.read_text(errors="replace") for log in logs]
    for part, text in enumerate(texts):
        print(f"--- part {part} of {processes}\n{text.rstrip()}")
    print(f"{summed(texts)}, by {processes} processes")
    return 1 if any(code not in (0, NO_TESTS) for code in codes) else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else min(MOST_PROCESSES, os.cpu_count() or 1)))
