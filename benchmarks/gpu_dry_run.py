"""`make gpu` without a GPU: the commands it would run, and what the tests and the smallest cases would compile.

    python3 benchmarks/gpu.py --dry-run [ARCH]

Nothing is compiled or launched, and nothing is timed: the time of compiling is an estimate, from the number of kernels.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of one process, on one core of a server's processor, for one kernel: an estimate, from the processor time of 24 of the
# shipped kernels for sm_90 drawn at random, all stages to machine code (Triton 3.6.0: 0.93 s each, the mean).
SECONDS_A_KERNEL = 1.0


def counted(python: str, arch: int, *command: str) -> dict | str:
    """What the plugin says of kernels that are asked for; or why it says nothing."""
    path = os.pathsep.join([str(REPOSITORY / "benchmarks"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(PYTHONPATH=path, DITQ_COUNTED_ARCH=str(arch))
    done = subprocess.run([python, *command], capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    found = re.findall(r'^\{"arch".*\}$', done.stdout, re.M)
    if not found:
        return f"nothing was counted: {(done.stderr or done.stdout).strip()[-300:]}"
    return json.loads(found[-1])


def told(found: dict | str, processes: int) -> list[str]:
    """Lines about it."""
    if isinstance(found, str):
        return [f"  {found}"]
    seconds = found["kernels"] * SECONDS_A_KERNEL / processes
    return [
        f"  {found['tests']} cases would compile {found['kernels']} kernels: about {seconds:.0f} s by {processes} "
        f"processes at {SECONDS_A_KERNEL:g} s a kernel (an estimate; nothing was timed)",
        f"  of {', '.join(f'{name} {count}' for name, count in found['by_kernel'].items())}",
        f"  asked for first by {', '.join(f'{name} {count}' for name, count in found['by_test'].items())}",
        *([f"  {found['ended_early']} ended early, as nothing is computed"] if found["ended_early"] else []),
    ]


def show(steps, machine, arch: int) -> int:
    """Print every step; the exit code is 1 if nothing could be counted."""
    from gpu_tests import MOST_PROCESSES, OPTIONS

    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    failed = False
    for step in steps:
        command = step.command(machine)
        shown = f"left out here: {command}" if isinstance(command, str) else shlex.join(map(str, command))
        shown = re.sub(r"\s*\n\s*", "; ", shown.replace(str(REPOSITORY) + os.sep, ""))
        print(f"{step.name} (at most {step.seconds:.0f} s): {shown}", flush=True)
        if isinstance(command, str):
            continue
        if step.name == "tests":
            found = counted(machine.python, arch, "-m", "pytest", *OPTIONS, "-p", "counted_kernels", "tests")
        elif step.name == "smallest-cases":
            found = counted(machine.python, arch, str(REPOSITORY / "benchmarks" / "counted_kernels.py"))
        else:
            continue
        failed |= isinstance(found, str)
        print("\n".join(told(found, processes if step.name == "tests" else 1)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit("run it by benchmarks/gpu.py --dry-run")
