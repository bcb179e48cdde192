"""The CUDA extension's kernels for few rows, run without a GPU: compiled by the host's compiler over tests/emulation,
which runs a block's threads one by one and carries out the matrix instruction from its documented layout. All files but
two (the matrix instruction and the launch) are those that the GPU gets, so that every index and bound is put to the
test; a read past the end of an operand is fatal.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import activations, assert_product, linear

from ditq_kernels import QuantLinear
from ditq_kernels.kernels.config import Config, arithmetic
from ditq_kernels.layer import reference
from ditq_kernels.layer.formats import CODE4_MAX, WEIGHT_FORMATS, largest_multiplier

ROOT = Path(__file__).parent.parent
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/float_type.h
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MATRIX, SCALAR, AS_BOUND = 0, 1, 2
NO_GROUPS = 31
# (M, N, K): every fill of one and two tiles of rows, N inside, at and past a tile's edge, K that ends inside a group, a
# half-block and a step, and one that gives every warp several steps.
SHAPES = (
    (1, 16, 128),
    (2, 40, 208),
    (3, 72, 16),
    (7, 33, 320),
    (6, 20, 136),
    (8, 24, 80),
    (9, 32, 144),
    (12, 70, 1040),
    (16, 40, 2240),
    (5, 9, 130),
    (16, 7, 201),
    (4, 3, 1),
)
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
dtypes = pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=NAMES.get)
problems = pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        pytest.param(fmt, shape, id="{}-M{}-N{}-K{}".format(name, *shape))
        for name, fmt in WEIGHT_FORMATS.items()
        for shape in SHAPES
        if (fmt.group or 0) <= shape[2]
    ],
)
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, whose headers the kernels need, is absent")


def build(folder, *sources):
    """The program made of ``sources`` of tests/emulation and csrc, which come together in ``folder``."""
    for pattern in ("csrc/*.cu", "csrc/*.cuh", "csrc/*.h", "tests/emulation/*"):  # the last one's files go over others
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    warnings = "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"
    # Checked forms of longjmp, which some distributions ask for, refuse to go to another stack.
    options = ["-std=c++17", "-O1", f"-Xcompiler={warnings},-U_FORTIFY_SOURCE", "-include", "gpu.h"]
    subprocess.run(["nvcc", "-x", "c++", *options, *sources, "-o", "program"], cwd=folder, check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The program of tests/emulation/small_product.cpp."""
    folder = tmp_path_factory.mktemp("emulation")
    return build(folder, "small_product_mma.cu", "small_product_fma.cu", "small_product.cpp")


def test_decoders(tmp_path):
    """Every code with every multiplier and zero point, as int8, bf16 and fp16."""
    result = subprocess.run([build(tmp_path, "decoders.cpp")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(result.stdout) == sum(largest_multiplier(zero_point) for zero_point in range(CODE4_MAX + 1))


def product(emulator, x, weight, bias, silu=False, kernel=AS_BOUND, misalignment=0):
    """([M, N], the kernel that ran) of ``reference.linear_a16``'s arguments."""
    rows, out_features = len(x), weight.out_features
    qweight, scale, group_code, fmt, in_features = weight
    header = (
        FLOAT_TYPES[x.dtype],
        -1 if bias is None else FLOAT_TYPES[bias.dtype],
        fmt.bits,
        rows,
        out_features,
        in_features,
        fmt.group_count(in_features),
        fmt.group.bit_length() - 1 if fmt.group else NO_GROUPS,
        x.stride(0),
        qweight.shape[1],
        silu,
        kernel,
        misalignment,
    )
    # All that the strides of x reach, and nothing behind the last element.
    reached = torch.as_strided(x, ((rows - 1) * x.stride(0) + in_features,), (1,), x.storage_offset())
    problem, result = emulator.with_suffix(".problem"), emulator.with_suffix(".result")
    with problem.open("wb") as file:
        file.write(struct.pack("<13q", *header))
        for operand in (reached, qweight, scale, group_code, bias):
            content = b"" if operand is None else bytes(operand.contiguous().flatten().view(torch.uint8).tolist())
            file.write(struct.pack("<q", len(content)) + content)
    subprocess.run([emulator, problem, result], check=True)
    content = bytearray(result.read_bytes())
    ran = content.pop()
    return torch.frombuffer(content, dtype=x.dtype).view(rows, out_features), ran


def stored(fmt, out_features, in_features):
    """The weight and the bias of a layer in ``fmt``."""
    layer = QuantLinear.from_linear(
        linear(out_features, in_features, torch.device("cpu")), fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
    )
    return layer.packed_weight, layer.bias.detach()


def assert_is_the_product(actual, x, weight, bias, silu=False):
    assert_product(actual, x, reference.dequantize(weight), bias, arithmetic(Config("cuda"), x.element_size()), silu)


def suits_matrix_kernel(x, fmt):
    """As csrc/small_product.h has it, for aligned pointers."""
    in_features = x.shape[1]
    whole_rows = fmt.bits == 4 or in_features % 16 == 0
    return x.dtype != torch.float32 and whole_rows and in_features % 8 == 0 and x.stride(0) % 8 == 0


@pytest.mark.parametrize("bits", [16, 32])
@problems
def test_products(fmt, shape, bits, emulator):
    rows, out_features, in_features = shape
    dtype = torch.float32 if bits == 32 else (torch.bfloat16, torch.float16)[SHAPES.index(shape) % 2]
    weight, bias = stored(fmt, out_features, in_features)
    x = activations(rows, in_features, dtype, torch.device("cpu"))
    actual, ran = product(emulator, x, weight, bias)
    assert ran == (MATRIX if suits_matrix_kernel(x, fmt) else SCALAR)
    assert_is_the_product(actual, x, weight, bias)
    if ran == MATRIX:  # the other kernel serves these too
        actual, _ = product(emulator, x, weight, bias, kernel=SCALAR)
        assert_is_the_product(actual, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["matrix", "scalar"])
@formats
def test_identity_activations_decode_the_weight(fmt, dtype, emulator):
    """With one-hot rows the product is the weight itself: every code, group and half-block lands where it belongs."""
    out_features, in_features = 16, 160
    weight, _ = stored(fmt, out_features, in_features)
    scale = torch.exp2(torch.randint(-3, 4, weight.scale.shape)).to(torch.float32)  # so that 16 bits hold the product
    weight = weight._replace(scale=scale)
    expected = reference.dequantize(weight).T
    identity = torch.eye(in_features, dtype=dtype)
    for first in range(0, in_features, 16):
        actual, _ = product(emulator, identity[first : first + 16], weight, None)
        assert torch.equal(actual.float(), expected[first : first + 16])


@dtypes
@pytest.mark.parametrize("name", ["w8", "w8_g32", "w4", "w4_g32"])
def test_silu_and_a_bias_of_each_type(name, dtype, emulator):
    fmt = WEIGHT_FORMATS[name]
    weight, bias = stored(fmt, 40, 256)
    x = activations(6, 256, dtype, torch.device("cpu"))
    for bias_dtype in FLOAT_TYPES:
        added = bias.to(bias_dtype)
        actual, _ = product(emulator, x, weight, added, silu=True)
        assert_is_the_product(actual, x, weight, added, silu=True)


@dtypes
@pytest.mark.parametrize("misalignment", [4, 8])
@pytest.mark.parametrize("name", ["w8_g32", "w4_g64"])
def test_operands_that_begin_anywhere(name, misalignment, dtype, emulator):
    fmt = WEIGHT_FORMATS[name]
    weight, bias = stored(fmt, 24, 160)
    x = activations(9, 160, dtype, torch.device("cpu"))
    actual, ran = product(emulator, x, weight, bias, misalignment=misalignment)
    assert ran == SCALAR
    assert_is_the_product(actual, x, weight, bias)


def test_rows_that_end_inside_a_vector(emulator):
    fmt = WEIGHT_FORMATS["w4_g32"]
    weight, bias = stored(fmt, 24, 133)
    x = activations(5, 136, torch.bfloat16, torch.device("cpu"))[:, :133]
    assert x.stride(0) % 8 == 0
    actual, ran = product(emulator, x, weight, bias)
    assert ran == SCALAR
    assert_is_the_product(actual, x, weight, bias)


def test_a_row_that_is_not_finite_stays_alone(emulator):
    fmt = WEIGHT_FORMATS["w4_g128"]
    weight, bias = stored(fmt, 24, 200)
    x = activations(9, 200, torch.bfloat16, torch.device("cpu"))
    x[3, 7] = float("nan")
    actual, ran = product(emulator, x, weight, bias)
    broken = actual.isnan()
    assert ran == MATRIX and broken[3].all() and not broken[:3].any() and not broken[4:].any()
