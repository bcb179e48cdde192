"""A model that is quantized while it is loaded takes little more memory than it has in the end."""

import subprocess
import sys
from pathlib import Path

import diffusers  # noqa: F401 (without it there is nothing to load)
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "load_memory.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="anonymous memory is read from /proc")
def test_the_peak_is_the_quantized_model_and_three_layers(tmp_path):
    command = [sys.executable, SCRIPT, "--layers", "3", "--width", "1024", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "MB over imports" in done.stdout, done.stdout + done.stderr[-2000:]
