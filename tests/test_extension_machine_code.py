"""The machine code in the CUDA extension's library, read without a GPU."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ditq_kernels.layer import extension

INT8_ARCHITECTURE = "sm_90a"
SMALL_ARCHITECTURES = {f"sm_{capability}" for capability in extension.SMALL_CAPABILITIES}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is absent: the extension is not built")


@dataclass
class Kernel:
    name: str
    architecture: str
    instructions: Counter = field(default_factory=Counter)


def cuobjdump():
    """Triton's wheel brings it; the CUDA toolkit's, else."""
    triton = pytest.importorskip("triton")
    brought = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(brought) if brought.exists() else shutil.which("cuobjdump") or pytest.skip("there is no cuobjdump")


def read(*options):
    return subprocess.run([cuobjdump(), *options, extension.LIBRARY], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of the library with its instructions, without their modifiers and predicates."""
    assert extension.LIBRARY.exists()
    found, architecture = [], None
    for line in read("-sass").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif match := re.search(r"Function : (\S+)", line):
            found.append(Kernel(match[1], architecture))
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", line):
            found[-1].instructions[match[1]] += 1
    return found


def named(kernels, name):
    return [kernel for kernel in kernels if name in kernel.name]


def test_every_architecture_has_every_kernel(kernels):
    tiles_and_types = len(extension.TILES) * len(extension.INT8_DTYPES)
    assert Counter(k.architecture for k in named(kernels, "GemmUniversal")) == {INT8_ARCHITECTURE: tiles_and_types}
    matrix = Counter(k.architecture for k in named(kernels, "small_product_mma_kernel"))
    assert matrix == dict.fromkeys(SMALL_ARCHITECTURES, 2 * 2 * 3)  # dtypes, bits, tiles of outputs and rows
    scalar = Counter(k.architecture for k in named(kernels, "small_product_fma_kernel"))
    assert scalar == dict.fromkeys(SMALL_ARCHITECTURES, 3 * 2)  # dtypes, bits
    assert len(kernels) == matrix.total() + scalar.total() + tiles_and_types


def test_later_gpus_find_code_to_compile():
    last = max(extension.SMALL_CAPABILITIES)
    assert set(re.findall(r"sm_\d+", read("-lptx"))) == {f"sm_{last}"}


def test_nothing_spills(kernels):
    for kernel in kernels:
        assert not kernel.instructions.keys() & {"LDL", "STL"}, kernel


def test_matrix_instructions(kernels):
    for kernel in kernels:
        matrix = {name for name in kernel.instructions if name.endswith("MMA")}
        wanted = {"GemmUniversal": {"IGMMA"}, "small_product_mma": {"HMMA"}, "small_product_fma": set()}
        assert matrix == next(one for name, one in wanted.items() if name in kernel.name), kernel


def test_the_int8_epilogue_rounds_each_step(kernels):
    """A fused multiply-add would round once where the contract rounds twice."""
    for kernel in named(kernels, "GemmUniversal"):
        assert "FFMA" not in kernel.instructions and kernel.instructions["FMUL"] and kernel.instructions["FADD"], kernel


def test_weights_are_read_in_vectors_of_16_bytes():
    code = read("-sass", "-arch", "sm_90")
    for name in ("small_product_mma_kernel", "small_product_fma_kernel"):
        assert len(re.findall(rf"Function : \S*{name}[\s\S]*?LDG\.E\.EF\.128", code)) > 0
