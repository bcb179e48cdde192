"""The machine code in the CUDA extension's library, read without a GPU."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ditq_kernels.layer import extension

INT8, INT8_ARCHITECTURE = "int8_product_kernel", "sm_90a"
SMALL_ARCHITECTURES = {f"sm_{capability}" for capability in extension.SMALL_CAPABILITIES}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is absent: the extension is not built")


@dataclass
class Kernel:
    """``instructions``: how often each is there, by its name alone; ``code``: each with its modifiers and operands."""

    name: str
    architecture: str
    instructions: Counter = field(default_factory=Counter)
    code: list[str] = field(default_factory=list, repr=False)

    @property
    def tile(self):
        """Of the int8 product."""
        return extension.TILES[int(re.search(r"Int8TileILi(\d+)E", self.name)[1])]

    def count(self, pattern):
        return sum(re.match(pattern, instruction) is not None for instruction in self.code)


def cuobjdump():
    """Triton's wheel brings it; the CUDA toolkit's, else."""
    triton = pytest.importorskip("triton")
    brought = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(brought) if brought.exists() else shutil.which("cuobjdump") or pytest.skip("there is no cuobjdump")


def read(*options):
    return subprocess.run([cuobjdump(), *options, extension.LIBRARY], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of the library with its instructions, without their predicates."""
    assert extension.LIBRARY.exists()
    found, architecture = [], None
    for line in read("-sass").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif match := re.search(r"Function : (\S+)", line):
            found.append(Kernel(match[1], architecture))
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(([A-Z][A-Z0-9]*)[^;]*?) *;", line):
            found[-1].instructions[match[2]] += 1
            found[-1].code.append(match[1])
    return found


def named(kernels, name):
    return [kernel for kernel in kernels if name in kernel.name]


def test_every_architecture_has_every_kernel(kernels):
    tiles_and_types = len(extension.TILES) * len(extension.INT8_DTYPES)
    assert Counter(k.architecture for k in named(kernels, INT8)) == {INT8_ARCHITECTURE: tiles_and_types}
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
        wanted = {INT8: {"IGMMA"}, "small_product_mma": {"HMMA"}, "small_product_fma": set()}
        assert matrix == next(one for name, one in wanted.items() if name in kernel.name), kernel


def test_the_int8_epilogue_rounds_each_step(kernels):
    """A fused multiply-add would round once where the contract rounds twice."""
    for kernel in named(kernels, INT8):
        assert "FFMA" not in kernel.instructions and kernel.instructions["FMUL"] and kernel.instructions["FADD"], kernel


def test_weights_are_read_in_vectors_of_16_bytes():
    code = read("-sass", "-arch", "sm_90")
    for name in ("small_product_mma_kernel", "small_product_fma_kernel"):
        assert len(re.findall(rf"Function : \S*{name}[\s\S]*?LDG\.E\.EF\.128", code)) > 0


def test_an_int8_product_stays_in_flight(kernels):
    """While one step's products run, the last one's are waited for. Where the compiler finds their registers touched in
    between, it waits for each product by itself, for all of them to end.
    """
    for kernel in named(kernels, INT8):
        assert kernel.count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1$"), kernel
        assert kernel.count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0$") == 1, kernel  # at the end of a tile
        products = kernel.instructions["IGMMA"]
        assert products == kernel.count(rf"IGMMA\.64x{kernel.tile.outputs}x32\.S8\.S8 "), kernel
        assert products >= 4 * kernel.count(r"WARPGROUP\.ARRIVE"), kernel  # one fence for the products of a step


def test_the_int8_product_waits_for_no_memory(kernels):
    """An arrival that released what was written to the whole cluster would drain every load and store (MEMBAR), and a
    wait that acquired from it would empty the first cache (CCTL), for each stage. The first meeting alone does that.
    """
    for kernel in named(kernels, INT8):
        assert not kernel.instructions.keys() & {"MEMBAR", "ERRBAR"}, kernel
        assert kernel.count(r"CCTL\.IVALL") == kernel.instructions["CCTL"] == 1, kernel
        meeting = next(place for place, one in enumerate(kernel.code) if one.startswith("UCGABAR_WAIT"))
        first = next(place for place, one in enumerate(kernel.code) if one.startswith(("IGMMA", "UTMALDG")))
        assert meeting < next(place for place, one in enumerate(kernel.code) if one.startswith("CCTL")) < first


def test_the_int8_product_moves_whole_vectors(kernels):
    """Stores of 16 bytes, and tiles by the copy engine: the weights' to all of a cluster."""
    for kernel in named(kernels, INT8):
        fragments = kernel.tile.rows // (64 if kernel.tile.schedule == "ping_pong" else 128)  # of a warpgroup
        stores = kernel.instructions["STG"]
        assert stores == kernel.count(r"STG\.E\.128 ") == fragments * kernel.tile.outputs // 16, kernel
        copies = kernel.instructions["UTMALDG"]
        assert copies == 2 * kernel.count(r"UTMALDG\.2D\.MULTICAST ") > 0, kernel


def test_warpgroups_of_the_int8_product_take_turns_in_ping_pong_only(kernels):
    for kernel in named(kernels, INT8):
        turns = kernel.count(r"BAR\.ARV .*, 0x100$"), kernel.count(r"BAR\.SYNC\S* .*, 0x100$")
        assert turns == ((1, 1) if kernel.tile.schedule == "ping_pong" else (0, 0)), kernel
