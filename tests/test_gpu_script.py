"""`make gpu`: a step that fails or hangs costs the others nothing, and the deadline holds."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu_script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_script", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python_step(gpu_script, name, program, seconds=30.0, needs_gpu=False):
    return gpu_script.Step(name, lambda machine: [machine.python, "-c", program], seconds, needs_gpu)


def test_the_check_of_the_extension_imports_what_there_is(gpu_script):
    done = subprocess.run([sys.executable, "-c", gpu_script.EXTENSION_CHECK], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "extension" in done.stdout and not done.stderr


def test_a_failing_and_a_hanging_step_cost_the_others_nothing(gpu_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_script, "find_gpu", lambda python: None)
    monkeypatch.setattr(gpu_script, "find_python", lambda: sys.executable)
    hanging = "import time; print('hangs', flush=True); time.sleep(600)"
    steps = (
        python_step(gpu_script, "good", "print('first'); print('all well')"),
        python_step(gpu_script, "bad", "print('about to'); raise SystemExit(3)"),
        python_step(gpu_script, "slow", hanging, seconds=2.0),
        python_step(gpu_script, "needy", "print('never')", needs_gpu=True),
        gpu_script.Step("absent", lambda machine: "a tool is not installed", 5.0, needs_gpu=False),
        python_step(gpu_script, "last", "import os; print(os.environ['DITQ_TABLES'])"),
    )
    started = time.monotonic()
    code = gpu_script.main(["--out", str(tmp_path / "out"), "--seconds", "60"], steps)
    assert code == 1 and time.monotonic() - started < 50
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert capsys.readouterr().out.rstrip().endswith(lines[-1])
    states = {line.split()[0]: line for line in lines}
    assert re.match(r"good +ok .* all well$", states["good"])
    assert re.match(r"bad +FAILED .* exit code 3: about to$", states["bad"])
    assert re.match(r"slow +FAILED .* stopped after 2 s: hangs$", states["slow"])
    assert re.match(r"needy +skipped .* no GPU$", states["needy"])
    assert re.match(r"absent +skipped .* a tool is not installed$", states["absent"])
    assert str(tmp_path / "out" / "tables") in states["last"]
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "===== good =====\nfirst\nall well" in logs and "===== slow =====\nhangs" in logs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs.txt", "summary.txt"]


def test_the_deadline_cuts_off_the_end(gpu_script, tmp_path):
    machine = gpu_script.Machine(sys.executable, tmp_path, None)
    steps = (
        python_step(gpu_script, "long", "import time; time.sleep(600)", seconds=500.0),
        python_step(gpu_script, "rest", "print('never')"),
    )
    outcomes = gpu_script.run(steps, machine, 2.0)
    assert [outcome.state for outcome in outcomes] == ["FAILED", "FAILED"]
    assert outcomes[1].remark == "no time was left for it"


def test_all_steps_are_skipped_or_pass_where_nothing_fails(gpu_script, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_script, "find_gpu", lambda python: None)
    steps = (python_step(gpu_script, "a", "pass"), python_step(gpu_script, "b", "pass", needs_gpu=True))
    assert gpu_script.main(["--out", str(tmp_path)], steps) == 0
    assert all(step.needs_gpu for step in gpu_script.STEPS if step.name not in ("environment", "inspect"))


def test_the_script_needs_the_standard_library_only():
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); before = set(sys.modules); import gpu; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('torch', 'ditq_kernels', 'triton')])"
    )
    result = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]", result.stderr
