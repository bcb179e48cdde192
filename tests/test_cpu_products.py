"""On CPUs, int8 activations and their products are, bit for bit, what the reference computes: by every level of
instructions that this CPU has, and by the others with their few instructions carried out one by one.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import activations, generator, linear

import ditq_kernels as ditq
from ditq_kernels import QuantLinear
from ditq_kernels.layer import cpu, cpu_extension, reference
from ditq_kernels.layer.cpu_extension import ACTIVATION_DTYPES, OUTPUT_DTYPES
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.gated_residual import GatedResidual
from ditq_kernels.layer.packed_weight import PackedWeight
from ditq_kernels.layer.packing import LAYOUTS, pack_groups
from ditq_kernels.layer.quantizer import quantize_weight

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WHY_NOT = cpu_extension.why_no_products()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
LEVELS = () if WHY_NOT else cpu_extension.product_levels()
levels = pytest.mark.parametrize("level", LEVELS)
# (M, N, K): rows at, below and past a tile of every level, outputs that end inside a lane, a panel and a task, inputs
# that end inside a group, a block of nibbles and a block of panels; and one of several tasks along both.
SHAPES = (
    (1, 1, 1),
    (2, 5, 33),
    (6, 16, 128),
    (7, 17, 130),
    (13, 64, 256),
    (32, 72, 200),
    (33, 100, 1025),
    (70, 130, 1152),
    (600, 65, 320),
)
problems = pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        pytest.param(fmt, shape, id="{}-M{}-N{}-K{}".format(name, *shape))
        for name, fmt in WEIGHT_FORMATS.items()
        for shape in SHAPES
        if (fmt.group or 0) <= shape[2]
    ],
)
EMULATED = ("avx512_vnni", "amx")


def weight_of(fmt, outputs, inputs, seed=0):
    quantized = quantize_weight(linear(outputs, inputs, CPU, seed).weight.detach(), fmt)
    groups = pack_groups(quantized.multiplier, quantized.zero_point) if fmt.two_level else None
    return PackedWeight(LAYOUTS[fmt.layout].pack(quantized.codes), quantized.scale, groups, fmt, inputs)


def int8_activations(rows, inputs):
    """Codes and scales, with the largest codes throughout one row and a row that is NaN."""
    qx, sx = reference.quantize_activation(activations(rows, inputs, torch.float32, CPU))
    qx[0] = torch.where(torch.arange(inputs) % 2 == 0, 127, -128)
    if rows > 6:
        qx[5], sx[5] = 0, torch.nan
    return qx, sx


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@problems
@levels
def test_products(level, fmt, shape, has_bias):
    rows, outputs, inputs = shape
    weight, (qx, sx) = weight_of(fmt, outputs, inputs), int8_activations(rows, inputs)
    bias = torch.randn(outputs, generator=generator(1)).to(torch.bfloat16) if has_bias else None
    for dtype in OUTPUT_DTYPES:
        if dtype != torch.int32 or not fmt.promoted:
            found = cpu_extension.linear_a8(qx, sx, weight, bias, dtype, level=level)
            assert_same_bits(found, reference.linear_a8(qx, sx, weight, bias, dtype))


def residual_of(rows, outputs, dtype, seed=2):
    """A part of a wider stream, and gates of which each is for as few rows as can be; a row of the stream is NaN."""
    samples = next(samples for samples in range(min(rows, 5), 0, -1) if rows % samples == 0)
    residual = torch.randn(rows, outputs + 3, generator=generator(seed)).to(dtype)[:, 1 : outputs + 1]
    residual[rows // 2] = torch.nan
    gate = torch.randn(samples, 2 * outputs, generator=generator(seed + 1)).to(dtype)[:, outputs:]
    return GatedResidual(residual, gate)


@problems
@levels
def test_added_products(level, fmt, shape):
    rows, outputs, inputs = shape
    weight, (qx, sx) = weight_of(fmt, outputs, inputs), int8_activations(rows, inputs)
    bias = torch.randn(outputs, generator=generator(1))
    for dtype in ACTIVATION_DTYPES:
        added = residual_of(rows, outputs, dtype)
        found = cpu_extension.linear_a8(qx, sx, weight, bias, dtype, added, level)
        assert_same_bits(found, reference.linear_a8(qx, sx, weight, bias, dtype, added=added))


@levels
def test_tasks_of_many_inputs_are_wide(level):
    """Activations that no second cache holds; outputs that end inside a wide task."""
    weight, (qx, sx) = weight_of(WEIGHT_FORMATS["w4_g128"], 400, 4608), int8_activations(1100, 4608)
    found = cpu_extension.linear_a8(qx, sx, weight, None, torch.float32, level=level)
    assert_same_bits(found, reference.linear_a8(qx, sx, weight, None, torch.float32))


@pytest.mark.parametrize("threads", [1, 3, 16])
@levels
def test_any_number_of_threads_gives_the_same(level, threads, one_thread):
    """Of few outputs, many threads share the rows."""
    torch.set_num_threads(threads)  # the fixture brings back what was
    for name in ("w8_g128", "w4_g64"):
        weight, (qx, sx) = weight_of(WEIGHT_FORMATS[name], 130, 640), int8_activations(1500, 640)
        found = cpu_extension.linear_a8(qx, sx, weight, None, torch.float32, level=level)
        assert_same_bits(found, reference.linear_a8(qx, sx, weight, None, torch.float32))


@levels
def test_many_rows_take_turns(level):
    weight, (qx, sx) = weight_of(WEIGHT_FORMATS["w4_g32"], 24, 64), int8_activations(8192 + 1100, 64)
    bias = torch.ones(24)
    for dtype in (torch.float32, torch.bfloat16):
        added = residual_of(len(qx), 24, dtype)
        found = cpu_extension.linear_a8(qx, sx, weight, bias, dtype, added, level)
        assert_same_bits(found, reference.linear_a8(qx, sx, weight, bias, dtype, added=added))


def test_every_code_of_int8():
    """Also those that the quantizer never makes."""
    codes = torch.arange(-128, 128).to(torch.int8).repeat(64, 4)
    weight = PackedWeight(codes, torch.ones(64), None, WEIGHT_FORMATS["w8"], 1024)
    qx = torch.full((8, 1024), -128, dtype=torch.int8)
    for level in LEVELS:
        found = cpu_extension.linear_a8(qx, torch.ones(8), weight, None, torch.int32, level=level)
        assert_same_bits(found, reference.linear_a8(qx, torch.ones(8), weight, None, torch.int32))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library of tests/emulation/cpu_products.cpp."""
    folder = tmp_path_factory.mktemp("emulation")
    source = ROOT / "csrc" / "cpu"
    options = ["-std=c++17", "-O1", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-Wno-psabi"]
    compiler = [shutil.which("g++"), *options]
    objects = []
    for level in EMULATED:
        instructions = ROOT / "tests" / "emulation" / f"{level}_instructions.h"
        defined = [f"-DDITQ_LEVEL={level}", f'-DDITQ_TILE="tile_{level}.h"', "-DDITQ_LANES=16"]
        defined += [f'-DDITQ_INSTRUCTIONS="{instructions}"', f"-I{source}"]
        objects.append(folder / f"{level}.o")
        subprocess.run(
            [*compiler, *defined, "-c", source / "int8_product.cpp", "-o", objects[-1]], check=True, capture_output=True
        )
    library = folder / "cpu_products.so"
    entry = ROOT / "tests" / "emulation" / "cpu_products.cpp"
    subprocess.run([*compiler, f"-I{source}", "-shared", entry, *objects, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def emulated_product(library, level, qx, sx, weight, bias, dtype, added, task_tiles, task_outputs):
    def address(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    fmt, size = weight.fmt, ctypes.c_int64
    out = torch.empty(len(qx), weight.out_features, dtype=dtype)
    library.product(
        level.encode(),
        address(qx),
        address(sx),
        size(qx.shape[0]),
        size(qx.shape[1]),
        address(weight.qweight),
        size(weight.qweight.shape[1]),
        size(weight.out_features),
        size(fmt.group or weight.in_features),
        address(weight.group_code),
        address(weight.scale),
        int(fmt.promoted),
        address(bias),
        address(out),
        (torch.float32, torch.bfloat16, torch.float16, torch.int32).index(dtype),
        address(added and added.residual),
        size(added.residual.stride(0) if added else 0),
        address(added and added.gate),
        size(added.gate.stride(0) if added else 0),
        size(added.rows_per_gate if added else 1),
        size(task_tiles),
        size(task_outputs),
    )
    return out


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent")
@problems
@pytest.mark.parametrize("level", EMULATED)
def test_emulated_products(emulated, level, fmt, shape):
    rows, outputs, inputs = shape
    rows = min(rows, 150)  # some tiles of the largest
    weight, (qx, sx) = weight_of(fmt, outputs, inputs), int8_activations(rows, inputs)
    bias = torch.randn(outputs, generator=generator(1))
    for index, dtype in enumerate(OUTPUT_DTYPES):
        if dtype != torch.int32 or not fmt.promoted:
            task = {"task_tiles": 1 + 2 * index, "task_outputs": 64 * (1 + index % 3)}
            for added in (None, residual_of(rows, outputs, dtype)) if dtype.is_floating_point else (None,):
                found = emulated_product(emulated, level, qx, sx, weight, bias, dtype, added, **task)
                assert_same_bits(found, reference.linear_a8(qx, sx, weight, bias, dtype, added=added))


def special_rows(rows, inputs, dtype):
    """Rows of zeros, of the smallest numbers, of ties, of one outlier, and such as are not finite."""
    x = activations(rows, inputs, torch.float32, CPU).clone()
    x[0] = 0
    x[1] *= torch.finfo(dtype).tiny
    x[2] = torch.arange(inputs) % 255 - 127 + 0.5
    x[3, inputs // 2] = torch.finfo(dtype).max
    x[4, 0], x[5, inputs - 1], x[6, inputs // 2] = torch.nan, torch.inf, -torch.inf
    x[7] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("amax", [None, 0.75, 0.0, 1e-38, torch.inf, torch.nan], ids="amax {}".format)
@pytest.mark.parametrize("inputs", [1, 7, 128, 200, 1152])
@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@levels
def test_quantized_activations(level, dtype, inputs, amax):
    x = special_rows(40, inputs, dtype)
    amax = None if amax is None else torch.tensor([amax])
    for rows in (x, x[::3], x.T.contiguous().T):
        found = cpu_extension.quantize_activation(rows, amax, level)
        expected = reference.quantize_activation(rows, amax)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("amax", [None, 0.75], ids="amax {}".format)
@problems
@levels
def test_quantized_and_multiplied_at_once(level, fmt, shape, amax):
    rows, outputs, inputs = shape
    weight, amax = weight_of(fmt, outputs, inputs), None if amax is None else torch.tensor([amax])
    for number, dtype in enumerate(ACTIVATION_DTYPES):
        x = activations(rows, inputs, torch.float32, CPU).to(dtype)
        if rows > 6:
            x[5, inputs - 1] = torch.nan
        kind = (None, *ACTIVATION_DTYPES, torch.float64)[(number + rows) % 5]
        bias = None if kind is None else torch.randn(outputs, generator=generator(1)).to(kind)
        for given in (x, x[::3], x.T.contiguous().T):
            found = cpu_extension.quantized_linear(given, amax, weight, bias, level)
            assert_same_bits(found, reference.quantized_linear(given, amax, weight, bias))


@pytest.mark.parametrize("threads", [1, 3, 16])
@levels
def test_any_number_of_threads_quantizes_and_multiplies_the_same(level, threads, one_thread):
    weight, x = weight_of(WEIGHT_FORMATS["w4_g64"], 130, 640), activations(8192 + 1100, 640, torch.bfloat16, CPU)
    expected = reference.quantized_linear(x, None, weight, None)
    torch.set_num_threads(threads)  # the fixture brings back what was
    assert_same_bits(cpu_extension.quantized_linear(x, None, weight, None, level), expected)


@pytest.mark.parametrize("dtype", (*ACTIVATION_DTYPES, torch.float64), ids=str)
def test_other_ops_are_the_references_too(dtype):
    x = activations(24, 96, torch.float32, CPU).to(dtype).reshape(2, 12, 96)
    shift, scale = (torch.randn(2, 96, generator=generator(i)).to(dtype) for i in range(2))
    ours, theirs = (
        (*module.gelu_quantize(x[0], None), module.norm_modulate(x, None, None, shift, scale, 1e-6))
        for module in (cpu, reference)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_g128", "w4a8_g64", "w4a8_g128_static"])
def test_a_layer_and_its_gradient(scheme):
    layer = linear(40, 256, CPU)
    amax = 3.0 if scheme.endswith("static") else None
    quantized = QuantLinear.from_linear(layer, scheme, input_amax=amax)
    found = {}
    for backend in ("cpu", "reference"):
        x = activations(30, 256, torch.float32, CPU).clone().requires_grad_()
        with ditq.use_backend(backend):
            y = quantized(x)
            y.square().sum().backward()
        found[backend] = y.detach(), x.grad
    for one, other in zip(found["cpu"], found["reference"], strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(0, 4, 32), (3, 0, 32), (0, 0, 32)])
def test_what_is_empty(rows, outputs, inputs):
    qx, sx = cpu.quantize_activation(torch.ones(rows, inputs))
    codes = torch.ones(outputs, inputs, dtype=torch.int8)
    weight = PackedWeight(codes, torch.ones(outputs), None, WEIGHT_FORMATS["w8"], inputs)
    assert cpu.linear_a8(qx, sx, weight, None, torch.bfloat16).shape == (rows, outputs)
