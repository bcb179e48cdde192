"""Everything that a machine with a GPU can say about this repository, in one command: `make gpu`.

    python3 benchmarks/gpu.py [--out DIR] [--seconds 520] [--only STEP...] [--dry-run [ARCH]]

Needs PyTorch and Triton in the interpreter that runs it (or in .venv), and no network. Each step is a process with a
time limit, and all output lands in logs.txt; a step that fails or hangs costs the others nothing. Without a GPU, or
without what Triton needs to launch kernels, the steps that need one say so. The exit code is 1 if a step failed, or if
kernels of a GPU that is there cannot be launched.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 520.0
MOST_LOG = 1 << 20  # characters kept of a log, its end
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
KILL_GRACE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Attributes:
    python: the interpreter for the steps.
    out: directory of logs and results.
    arch: 10 * major + minor of the GPU, or None.
    lacks: in a sentence, what kernels need to run on the GPU and this machine lacks; empty if nothing.
    """

    python: str
    out: Path
    arch: int | None
    lacks: str = ""

    @property
    def tables(self) -> Path:
        return self.out / "tables"


@dataclasses.dataclass(frozen=True)
class Step:
    """Attributes:
    name: of the step and of its log.
    command: for a machine, or in words why the step cannot be taken there.
    seconds: its time limit.
    needs_gpu: whether it is left out where there is none.
    """

    name: str
    command: Callable[[Machine], list[str] | str]
    seconds: float
    needs_gpu: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    seconds: float
    remark: str


def environment(machine: Machine) -> dict[str, str]:
    """The package is found without being installed, and the kernels use the table that this run tunes."""
    path = os.pathsep.join(part for part in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if part)
    return os.environ | dict(PYTHONPATH=path, DITQ_TABLES=str(machine.tables), PYTHONUNBUFFERED="1")


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:150] if lines else ""


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGINT, signal.SIGKILL):  # interrupted, pytest still says what has failed so far
        try:
            os.killpg(process.pid, number)
            process.wait(KILL_GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def take(step: Step, machine: Machine, seconds_left: float) -> Outcome:
    """Run one step; its output goes to <out>/logs/<name>.log."""
    if step.needs_gpu and machine.arch is None:
        return Outcome(step.name, SKIPPED, 0.0, "no GPU")
    if step.needs_gpu and machine.lacks:
        return Outcome(step.name, SKIPPED, 0.0, machine.lacks)
    command = step.command(machine)
    if isinstance(command, str):
        return Outcome(step.name, SKIPPED, 0.0, command)
    limit = min(step.seconds, seconds_left)
    if limit < 1:
        return Outcome(step.name, FAILED, 0.0, "no time was left for it")
    log = machine.out / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(machine),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        said = None
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code, said = None, last_line(_read(log))
        finally:
            if process.poll() is None:
                stop(process)
    took = time.monotonic() - started
    said = said or last_line(_read(log))
    if code is None:
        return Outcome(step.name, FAILED, took, f"stopped after {limit:.0f} s: {said}")
    return Outcome(step.name, OK if code == 0 else FAILED, took, said if code == 0 else f"exit code {code}: {said}")


def run(steps: Sequence[Step], machine: Machine, seconds: float) -> list[Outcome]:
    """Take ``steps`` in turn, none of which may outlast ``seconds`` from now."""
    end = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        print(f"{step.name} ...", flush=True)
        outcomes.append(take(step, machine, end - time.monotonic()))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{outcome.name:{width}}  {outcome.state:7}  {outcome.seconds:4.0f} s  {outcome.remark}" for outcome in outcomes
    )


def has_module(python: str, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def _tests(machine: Machine) -> list[str] | str:
    if not has_module(machine.python, "pytest"):
        return "pytest is not installed"
    return [machine.python, str(REPOSITORY / "benchmarks" / "gpu_tests.py")]


EXTENSION_CHECK = """
import sys
from ditq_kernels.layer import extension
reason = extension.why_unavailable()
print(reason or "the CUDA extension is loaded")
sys.exit(1 if reason else 0)
"""
ENVIRONMENT = """
import subprocess, sys, torch
from ditq_kernels.benchmark.provenance import provenance
subprocess.run([sys.executable, "-m", "ditq_kernels", "env"], check=True)
versions = provenance()
print({name: versions[name] for name in ("torch", "cuda", "triton", "commit", "peers")})
if torch.cuda.is_available():
    subprocess.run(["nvidia-smi"])
    from ditq_kernels.benchmark.provenance import gpu
    print(gpu(torch.device("cuda", 0)))
"""


def _sanitizer(machine: Machine) -> list[str] | str:
    tool = shutil.which("compute-sanitizer") or next(
        (path for path in ("/usr/local/cuda/bin/compute-sanitizer",) if os.access(path, os.X_OK)), None
    )
    if tool is None:
        return "compute-sanitizer is not installed"
    script = str(REPOSITORY / "benchmarks" / "smallest_cases.py")
    # Every tensor an allocation of its own: within PyTorch's large ones, a step past a tensor's end goes unseen.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [*alone, tool, "--tool", "memcheck", "--error-exitcode", "9", machine.python, script]


def _extension(machine: Machine) -> list[str] | str:
    if not list((REPOSITORY / "ditq_kernels").glob("_C*.so")):
        return "the CUDA extension is not built here"
    return [machine.python, "-c", EXTENSION_CHECK]


INSPECTED = (80, 86, 89, 90, 100, 120)  # the architectures that `ditq inspect` knows
INSPECTED_WITHOUT_GPU = 90


def _inspect(machine: Machine) -> list[str]:
    """For the GPU's architecture, loaded by its driver, or for the last known one before it."""
    arch = INSPECTED_WITHOUT_GPU if machine.arch is None else machine.arch
    known = max((one for one in INSPECTED if one <= arch), default=INSPECTED[0])
    loaded = ["--driver"] if known == machine.arch else []
    return [machine.python, "-m", "ditq_kernels", "inspect", "--arch", str(known), *loaded]


def _smallest(machine: Machine) -> list[str]:
    return [machine.python, str(REPOSITORY / "benchmarks" / "smallest_cases.py")]


def _tune(machine: Machine) -> list[str]:
    return [machine.python, "-m", "ditq_kernels", "tune", "--quick", "--seconds", "80", "--out", str(machine.tables)]


def _bench(machine: Machine) -> list[str]:
    out = str(machine.out / "bench")
    return [machine.python, "-m", "ditq_kernels", "bench", "--quick", "--seconds", "90", "--out", out]


# The order is that of worth: what is right comes before what is fast, and the deadline cuts off the end.
STEPS = (
    Step("environment", lambda machine: [machine.python, "-c", ENVIRONMENT], 60, needs_gpu=False),
    Step("smallest-cases", _smallest, 80),
    Step("extension", _extension, 20),
    Step("inspect", _inspect, 150, needs_gpu=False),
    Step("tests", _tests, 130),
    Step("tune", _tune, 100),
    Step("bench", _bench, 120),
    Step("sanitizer", _sanitizer, 60),
)


def find_python() -> str:
    local = REPOSITORY / ".venv" / "bin" / "python"
    return str(local) if os.access(local, os.X_OK) else sys.executable


PROBE = (
    "import json, torch; "
    "print(json.dumps(list(torch.cuda.get_device_capability(0)) if torch.cuda.is_available() else None))"
)


def find_gpu(python: str) -> int | None:
    """10 * major + minor of the first GPU that PyTorch sees; None if it sees none, or is not there."""
    try:
        result = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120)
        capability = json.loads(result.stdout or "null")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return None if capability is None else 10 * capability[0] + capability[1]


def find_lacks(python: str) -> str:
    """What gpu_needs.py finds missing, printed with the versions it finds; empty if nothing is."""
    script = str(REPOSITORY / "benchmarks" / "gpu_needs.py")
    try:
        found = subprocess.run([python, script], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    print(found.stdout.rstrip(), flush=True)
    return last_line(found.stdout or found.stderr) if found.returncode else ""


def pack_logs(out: Path) -> None:
    """All logs in one file, each below a line with its name: one file is easier to carry off than many."""
    logs = sorted((out / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    text = "".join(f"===== {path.stem} =====\n{_read(path)[-MOST_LOG:].rstrip()}\n\n" for path in logs)
    (out / "logs.txt").write_text(text)
    shutil.rmtree(out / "logs", ignore_errors=True)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ["OUT"]) if os.environ.get("OUT") else REPOSITORY / "out" / "gpu"
    parser.add_argument("--out", type=Path, default=default, help="default: $OUT, else out/gpu")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all steps (default: %(default).0f)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps], metavar="STEP", help="these steps")
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=90, metavar="ARCH", help="show and count, run nothing (default: 90)"
    )
    args = parser.parse_args(arguments)
    chosen = [step for step in steps if args.only is None or step.name in args.only]
    if args.dry_run is not None:
        sys.path.insert(0, str(REPOSITORY / "benchmarks"))
        import gpu_dry_run

        python = find_python()
        lacks = find_lacks(python)
        return gpu_dry_run.show(chosen, Machine(python, args.out.resolve(), args.dry_run, lacks), args.dry_run)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "logs", ignore_errors=True)  # an earlier run's say nothing about this one
    python = find_python()
    machine = Machine(python, out, find_gpu(python), find_lacks(python))
    print(
        f"python {machine.python}, GPU {'none' if machine.arch is None else f'sm_{machine.arch}'}, out {out}",
        flush=True,
    )
    if args.only:  # the time of those left out is theirs
        chosen = [dataclasses.replace(step, seconds=args.seconds) for step in chosen]
    outcomes = run(chosen, machine, args.seconds - (time.monotonic() - started))
    targets = re.search(r"^targets.*?(?=^\S)", _read(out / "logs" / "bench.log"), re.MULTILINE | re.DOTALL)
    text = "\n".join(part for part in (targets and targets[0].rstrip(), summary(outcomes)) if part)
    pack_logs(out)
    (out / "summary.txt").write_text(text + "\n")
    print(text, flush=True)
    stopped = machine.arch is not None and machine.lacks
    return 1 if stopped or any(outcome.state == FAILED for outcome in outcomes) else 0


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
