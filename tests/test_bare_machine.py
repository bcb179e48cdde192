"""A machine that was prepared to run kernels has PyTorch, Triton and pytest, and nothing that generates pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
WITHOUT = ("diffusers", "accelerate", "transformers", "tokenizers", "peft", "torchmetrics", "matplotlib", "jinja2")
# Python imports it first of all.
SITE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {WITHOUT} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.fixture
def bare(tmp_path):
    """Runs Python with arguments, where the packages are not to be found."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        environment = os.environ | dict(PYTHONPATH=path)
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=REPOSITORY
        )

    return run


def test_the_tests_of_kernels_are_collected(bare):
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu or on_device"]
    done = bare("-m", "pytest", "--collect-only", *options, str(REPOSITORY / "tests"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for name in ("test_kernels", "test_routes", "test_fused_activations", "test_ops"):
        assert f"tests/{name}.py::" in done.stdout


def test_what_triton_needs_is_asked_for(bare, tmp_path):
    script = str(REPOSITORY / "benchmarks" / "gpu_needs.py")
    without_compiler = "import os, runpy; os.environ['PATH'] = ''; os.environ.pop('CC', None); "
    done = bare("-c", f"{without_compiler}runpy.run_path({script!r}, run_name='__main__')")
    assert done.returncode == 1 and "needs a C compiler" in done.stdout.splitlines()[-1]
    elsewhere = f"import runpy; missing = runpy.run_path({script!r})['missing']; "
    elsewhere += f"missing.__globals__.update(headers=lambda: {str(tmp_path)!r}, compiler=lambda: 'cc'); "
    assert "has none: apt-get install python3" in bare("-c", elsewhere + "print(missing())").stdout


def test_results_of_several_processes_are_added_up():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from gpu_tests import summed
    finally:
        sys.path.pop(0)
    texts = ["x\n3 passed, 1 skipped in 2.10s\n", "1 failed, 2 passed in 0.5s", "killed"]
    assert summed(texts) == "5 passed, 1 skipped, 1 failed"


def test_a_dry_run_shows_the_commands_and_counts_kernels(bare):
    done = bare("benchmarks/gpu.py", "--dry-run", "90", "--only", "inspect", "smallest-cases")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ditq_kernels inspect --arch 90" in done.stdout
    assert "kernels: about" in done.stdout and "an estimate" in done.stdout


def test_kernels_are_counted_by_code_and_types(bare):
    test = "tests/test_routes.py::test_small_products"
    environment = os.environ | dict(PYTHONPATH=f"{REPOSITORY / 'benchmarks'}{os.pathsep}{REPOSITORY}")
    environment.pop("TRITON_INTERPRET", None)
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "counted_kernels", "-k", "w4_g128"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, test],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"arch"')))
    assert found["tests"] == 2 and not found["ended_early"]
    # For each of two tiles: three types of activations, and one of a width that is a multiple of 16.
    assert set(found["by_kernel"]) == {"small_product_kernel"} and found["kernels"] == 8
