"""The CUDA extension: how it is built, what it declares, its machine code, and on a GPU its numbers."""

import importlib.metadata
import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from oracle import activations, assert_product, linear
from torch._subclasses.fake_tensor import FakeTensorMode

from ditq_kernels import QuantLinear
from ditq_kernels.kernels.config import EXTENSION_TILES, Config, arithmetic
from ditq_kernels.layer import extension, packing, reference
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.packed_weight import PackedWeight

ROOT = Path(__file__).parent.parent
HAS_NVCC = shutil.which("nvcc") is not None
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="nvcc is absent, so that the extension is not built")
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16, FP16 = torch.bfloat16, torch.float16


# ---- Numbers that stand in two places ----


def test_python_and_cpp_agree():
    header = (ROOT / "csrc" / "int8_product.h").read_text()
    tiles = re.findall(r"Int8Tile<(\d+)> : TileShape<(\d+), (\d+), (\d+), Schedule::(\w+)>", header)
    assert [int(number) for number, *_ in tiles] == list(range(len(extension.TILES)))
    assert [(*map(int, numbers), schedule) for _, *numbers, schedule in tiles] == [
        (tile.rows, tile.outputs, tile.cluster, tile.schedule) for tile in extension.TILES
    ]
    assert int(re.search(r"INT8_TILES = (\d+)", header)[1]) == len(tiles) == EXTENSION_TILES
    source = (ROOT / "csrc" / "int8_product.cu").read_text()
    compiled = re.findall(r"template const char\* launch_int8_product<(\d+)>", source)
    assert list(map(int, compiled)) == list(range(len(tiles)))
    kernel = (ROOT / "csrc" / "int8_product.cuh").read_text()
    assert int(re.search(r"\bSTEP = (\d+)", kernel)[1]) == extension.STEP
    small = (ROOT / "csrc" / "small_product.h").read_text()
    assert int(re.search(r"BLOCK = (\d+)", small)[1]) == packing.BLOCK
    assert int(re.search(r"SMALL_ROWS = (\d+)", small)[1]) == extension.SMALL_ROWS


# ---- What it declares ----


@pytest.fixture
def ops():
    """torch.ops.ditq_cuda. Installing the package beside nvcc has built the extension, and PyTorch without CUDA loads
    it.
    """
    if not list(importlib.metadata.distributions(name="ditq_kernels")) and extension.why_unavailable():
        pytest.skip("the package runs from its sources here, and the extension is not built")
    assert extension.why_unavailable() is None
    extension.load()
    return torch.ops.ditq_cuda


@needs_nvcc
def test_schemas(ops):
    assert str(ops.small_product.default._schema) == (
        "ditq_cuda::small_product(Tensor x, Tensor qweight, Tensor scale, Tensor? group_code, Tensor? bias, int bits, "
        "int group, bool silu) -> Tensor"
    )
    assert str(ops.int8_product.default._schema) == (
        "ditq_cuda::int8_product(Tensor qx, Tensor sx, Tensor qweight, Tensor scale, Tensor? bias, Tensor(a!) y, "
        "int tile) -> ()"
    )


def stored(fmt, out_features, in_features, device="cpu"):
    """The weight and the bias of a layer in ``fmt``."""
    layer = QuantLinear.from_linear(
        linear(out_features, in_features, torch.device("cpu")), fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
    ).to(device)
    return layer.packed_weight, layer.bias.detach()


@needs_nvcc
@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fakes(kind):
    weight, bias = stored(WEIGHT_FORMATS["w4_g64"], 24, 192)
    dense, _ = stored(WEIGHT_FORMATS["w8"], 24, 192)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def given(tensor):
        return mode.from_tensor(tensor) if kind == "fake" else tensor.to("meta")

    def everything(part):
        return None if part is None else given(part)

    def packed(weight):
        return PackedWeight(*map(everything, weight[:3]), *weight[3:])

    with mode:
        x = given(torch.zeros(5, 192, dtype=BF16))
        y = extension.linear_a16(x, packed(weight), everything(bias))
        assert (y.shape, y.dtype, y.device) == ((5, 24), BF16, x.device)
        qx, sx = given(torch.zeros(300, 192, dtype=torch.int8)), given(torch.zeros(300))
        y = extension.linear_a8(qx, sx, packed(dense), everything(bias), FP16)
        assert (y.shape, y.dtype, y.device) == ((300, 24), FP16, qx.device)
        dense = packed(dense)
        assert extension.int8_product(qx, sx, dense.qweight, dense.scale, None, y, 0) is None


def small_arguments(**changes):
    (qweight, scale, group_code, *_), bias = stored(WEIGHT_FORMATS["w4_g32"], 24, 192)
    given = dict(x=torch.zeros(3, 192), qweight=qweight, scale=scale, group_code=group_code, bias=bias)
    return {**given, "bits": 4, "group": 32, "silu": False, **changes}


def int8_arguments(**changes):
    given = dict(qx=torch.zeros(3, 32, dtype=torch.int8), sx=torch.ones(3), scale=torch.ones(24))
    given["qweight"] = torch.zeros(24, 32, dtype=torch.int8)
    return {**given, "bias": None, "y": torch.empty(3, 24, dtype=BF16), "tile": 0, **changes}


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "x must be on a CUDA device"),
        (dict(bits=3), "bits must be 4 or 8, got 3"),
        (dict(group=48), "group must be 0 .*, 32, 64 or 128, got 48"),
        (dict(x=torch.zeros(192)), "x must have 2 dimensions, got 1"),
        (dict(x=torch.zeros(17, 192)), "x must have at most 16 rows, got 17"),
        (dict(x=torch.zeros(3, 0)), "x must have columns"),
        (dict(x=torch.zeros(3, 192, dtype=torch.int8)), "x must be Float, Half or BFloat16, got Char"),
        (dict(x=torch.zeros(192, 3).T), "neighbours in a row of x must be neighbours in memory"),
        (dict(x=torch.zeros(3, 320)), r"qweight must be \[24, 192\], got \[24, 128\]"),
        (dict(qweight=torch.zeros(24, 128, dtype=torch.int8)), "qweight must be Byte, got Char"),
        (dict(qweight=torch.zeros(128, 24, dtype=torch.uint8).T), "qweight must be contiguous"),
        (dict(scale=torch.ones(24, dtype=BF16)), "scale must be Float, got BFloat16"),
        (dict(scale=torch.ones(6, 24)), r"scale must be \[24\], got \[6, 24\]"),
        (dict(group_code=None), "group_code belongs to 4-bit weights"),
        (dict(group_code=torch.zeros(3, 24, dtype=torch.uint8)), r"group_code must be \[6, 24\], got \[3, 24\]"),
        (dict(bias=torch.zeros(25)), r"bias must be \[24\], got \[25\]"),
        (dict(bias=torch.zeros(24, dtype=torch.int32)), "bias must be Float, Half or BFloat16, got Int"),
    ],
)
def test_the_small_product_says_what_is_wrong(changes, words, ops):
    with pytest.raises(RuntimeError, match=words):
        ops.small_product(**small_arguments(**changes))


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "qx must be on a CUDA device"),
        (dict(tile=8), "tile must be 0 to 7, got 8"),
        (dict(tile=-1), "tile must be 0 to 7, got -1"),
        (dict(y=torch.empty(3, 24)), "y must be Half or BFloat16, got Float"),
        (dict(y=torch.empty(3, 32, dtype=FP16)), r"y must be \[3, 24\], got \[3, 32\]"),
        (dict(y=torch.empty(72, dtype=FP16)), r"y must be \[3, 24\], got \[72\]"),
        (dict(y=torch.empty(24, 3, dtype=FP16).T), "neighbours in a row of y must be neighbours in memory"),
        (dict(y=torch.empty(3, 28, dtype=FP16)[:, :24]), "y must lie a multiple of 8 elements apart, .* got 28"),
        (dict(y=torch.empty(1, 24, dtype=FP16).expand(3, 24)), "a multiple of 8 .* and not in each other, got 0"),
        (dict(qx=torch.zeros(3, 24, dtype=torch.int8)), "columns of qx must be a multiple of 16, got 24"),
        (dict(qweight=torch.zeros(20, 32, dtype=torch.int8)), "rows of qweight must be a multiple of 8, got 20"),
        (dict(qx=torch.zeros(3, 32, dtype=torch.uint8)), "qx must be Char, got Byte"),
        (dict(qx=torch.zeros(3, 48, dtype=torch.int8)[:, :32]), "qx must be contiguous"),
        (dict(qweight=torch.zeros(24, 16, dtype=torch.int8)), r"qweight must be \[24, 32\], got \[24, 16\]"),
        (dict(sx=torch.ones(4)), r"sx must be \[3\], got \[4\]"),
        (dict(scale=torch.ones(6)[::2]), r"scale must be \[24\], got \[3\]"),
    ],
)
def test_the_int8_product_says_what_is_wrong(changes, words, ops):
    with pytest.raises(RuntimeError, match=words):
        ops.int8_product(**int8_arguments(**changes))


@needs_nvcc
def test_a_library_of_older_sources_is_named(ops, monkeypatch):
    class Older:
        class default:
            _schema = "ditq_cuda::int8_product(Tensor qx, ScalarType out_dtype, int tile) -> Tensor"

    monkeypatch.setattr(torch.ops.ditq_cuda, "int8_product", Older)
    monkeypatch.setattr(extension, "_failure", extension._failure.__wrapped__)
    assert re.search("built from older sources; .*DITQ_BUILD_CUDA=1", extension.why_unavailable())


def test_without_the_library_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(extension, "_failure", extension._failure.__wrapped__)
    assert re.search("not built; .*DITQ_BUILD_CUDA=1 pip install", extension.why_unavailable())
    with pytest.raises(ImportError, match="not built"):
        extension.load()
    extension.LIBRARY.write_text("no library")
    assert re.search("cannot be loaded .*DITQ_BUILD_CUDA=1", extension.why_unavailable())


# ---- What it supports ----


def test_what_the_int8_product_supports():
    w8 = WEIGHT_FORMATS["w8"]
    assert extension.why_unsupported_a8(4096, 1152, 1152, w8, BF16, 90) is None
    assert "8.9" in extension.why_unsupported_a8(4096, 1152, 1152, w8, BF16, 89)
    assert "w8_g128" in extension.why_unsupported_a8(4096, 1152, 1152, WEIGHT_FORMATS["w8_g128"], BF16, 90)
    assert "w4" in extension.why_unsupported_a8(4096, 1152, 1152, WEIGHT_FORMATS["w4"], BF16, 90)
    assert "float32" in extension.why_unsupported_a8(4096, 1152, 1152, w8, torch.float32, 90)
    assert "multiple of 16, not 1160" in extension.why_unsupported_a8(4096, 1152, 1160, w8, BF16, 90)
    assert "multiple of 8, not 1156" in extension.why_unsupported_a8(4096, 1156, 1152, w8, BF16, 90)
    with pytest.raises(ValueError, match="w4_g32"):
        extension.linear_a8(None, None, PackedWeight(None, None, None, WEIGHT_FORMATS["w4_g32"], 128), None, BF16)


@formats
def test_what_the_small_product_supports(fmt):
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert extension.why_unsupported_a16(16, 7, 201, fmt, BF16, capability) is None
    assert "7.5" in extension.why_unsupported_a16(1, 8, 128, fmt, FP16, 75)
    assert "11.0" in extension.why_unsupported_a16(1, 8, 128, fmt, FP16, 110)
    assert "not 17" in extension.why_unsupported_a16(17, 8, 128, fmt, FP16, 90)
    assert "float64" in extension.why_unsupported_a16(1, 8, 128, fmt, torch.float64, 90)


def test_the_choice_of_a_tile():
    """Few rows want many small tiles, many rows large ones, and a width that leaves no multiprocessor idle wins."""

    def chosen(rows, out_features, in_features):
        return extension.TILES[extension.choose_tile(rows, out_features, in_features, 132)]

    assert chosen(1, 1152, 1152).rows == 64
    middle = chosen(512, 1152, 1152)
    assert (middle.rows, middle.outputs, middle.cluster) == (64, 96, 4)  # 96 of 120 blocks at once, each with one tile
    large = chosen(8192, 12288, 3072)
    assert large.rows >= 128 and large.outputs >= 128
    for rows, multiprocessors in itertools.product((0, 1, 17, 500, 5000), (1, 2, 132)):
        assert extension.choose_tile(rows, 8, 16, multiprocessors) in range(len(extension.TILES))


@pytest.mark.parametrize("tile", extension.TILES, ids=lambda tile: f"{tile.rows}x{tile.outputs}x{tile.cluster}")
def test_the_estimate_grows_with_the_problem(tile):
    """Never less for more, and truly more where another round or step begins."""
    problem = (4096, 4096, 4096)
    for side in range(3):
        sizes = [(*problem[:side], size, *problem[side + 1 :]) for size in (1, 100, 4096, 4097, 40000)]
        estimates = [extension.microseconds(tile, *size, 132) for size in sizes]
        assert estimates == sorted(estimates) and estimates[0] < estimates[2] < estimates[-1]
    assert extension.microseconds(tile, *problem, 132) < extension.microseconds(tile, *problem, 66)


# ---- Numbers ----

# (M, N, K): K that ends inside a group, a half-block and a step, or that no matrix instruction takes; N inside a tile.
SMALL_SHAPES = ((1, 64, 128), (2, 96, 208), (5, 33, 320), (8, 1152, 1152), (9, 40, 2240), (16, 72, 1040), (13, 9, 201))
INT8_SHAPES = ((1, 64, 128), (17, 88, 48), (129, 144, 1152), (257, 1152, 1152), (530, 264, 4608))


@pytest.fixture
def cuda():
    reason = extension.why_unavailable()
    if reason:
        pytest.skip(reason)
    return torch.device("cuda")


def capability():
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def assert_is_the_product(actual, x, weight, bias, silu=False):
    assert_product(actual, x, reference.dequantize(weight), bias, arithmetic(Config("cuda"), x.element_size()), silu)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=lambda shape: "M{}-N{}-K{}".format(*shape))
@formats
def test_products_of_few_rows(fmt, shape, dtype, cuda):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, cuda)
    x = activations(rows, in_features, dtype, cuda)  # strided
    for given in (x, x.contiguous(), x[:, :].T.contiguous().T):
        assert_is_the_product(extension.linear_a16(given, weight, bias), x, weight, bias)
    assert_is_the_product(extension.linear_a16(x, weight, None), x, weight, None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(rows, cuda):
    for name in ("w8_g64", "w4_g128"):
        fmt = WEIGHT_FORMATS[name]
        weight, bias = stored(fmt, 152, 640, cuda)
        x = activations(rows, 640, BF16, cuda)
        assert_is_the_product(extension.linear_a16(x, weight, bias), x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["w8", "w4_g32"])
def test_silu_before_the_product(name, dtype, cuda):
    fmt = WEIGHT_FORMATS[name]
    weight, bias = stored(fmt, 96, 256, cuda)
    x = activations(7, 256, dtype, cuda)
    for bias_dtype in DTYPES:
        added = bias.to(bias_dtype)
        assert_is_the_product(extension.linear_a16(x, weight, added, silu=True), x, weight, added, silu=True)


@pytest.fixture
def hopper(cuda):
    if capability() != extension.INT8_CAPABILITY:
        pytest.skip("the int8 product is for compute capability 9.0")
    return cuda


def int8_operands(rows, out_features, in_features, device):
    """(qx, sx, weight, bias), all codes and signs."""
    weight, bias = stored(WEIGHT_FORMATS["w8"], out_features, in_features, device)
    qx, sx = reference.quantize_activation(activations(rows, in_features, torch.float32, device))
    return qx, sx, weight, bias


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tile", range(len(extension.TILES)))
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=lambda shape: "M{}-N{}-K{}".format(*shape))
@pytest.mark.parametrize("out_dtype", extension.INT8_DTYPES)
def test_int8_products_are_bit_exact(out_dtype, shape, tile, hopper):
    """Every step but the integer sum is one rounding in fp32, in an order that is part of the contract."""
    qx, sx, weight, bias = int8_operands(*shape, hopper)
    for added in (None, bias, bias.to(BF16), bias.to(FP16)):
        actual = extension.linear_a8(qx, sx, weight, added, out_dtype, tile)
        assert torch.equal(actual, reference.linear_a8(qx, sx, weight, added, out_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(extension.TILES)))
def test_what_lies_between_rows_of_the_output_is_left_alone(tile, hopper):
    qx, sx, weight, bias = int8_operands(300, 264, 640, hopper)
    whole = torch.full((302, 304), 7.0, dtype=BF16, device=hopper)
    y = whole[1:-1, 16:280]
    extension.int8_product(qx, sx, weight.qweight, weight.scale, bias, y, tile)
    assert torch.equal(y, reference.linear_a8(qx, sx, weight, bias, BF16))
    y.fill_(7)
    assert whole.eq(7).all()


@pytest.mark.gpu
def test_a_broken_row_gives_a_row_of_nan(hopper):
    qx, sx, weight, bias = int8_operands(40, 64, 128, hopper)
    sx[2] = float("nan")
    broken = extension.linear_a8(qx, sx, weight, bias, BF16).isnan()
    assert broken[2].all() and not broken[:2].any() and not broken[3:].any()


def calls(device):
    """The products, each as a function of nothing that writes to fresh memory."""
    weight, bias = stored(WEIGHT_FORMATS["w4_g128"], 200, 640, device)
    x = activations(12, 640, BF16, device)
    yield lambda: extension.linear_a16(x, weight, bias)
    yield lambda: extension.linear_a16(x.float(), weight, bias)
    if capability() == extension.INT8_CAPABILITY:
        qx, sx, weight, bias = int8_operands(300, 264, 640, device)
        yield lambda: extension.linear_a8(qx, sx, weight, bias, BF16)


@pytest.mark.gpu
def test_the_same_bits_every_time_and_in_a_graph_and_on_another_stream(cuda):
    for call in calls(cuda):
        expected = call()
        for _ in range(20):
            assert torch.equal(call(), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            elsewhere = call()
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(elsewhere, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_empty_batches(cuda):
    weight, bias = stored(WEIGHT_FORMATS["w8_g32"], 24, 128, cuda)
    empty = torch.empty(0, 128, dtype=FP16, device=cuda)
    assert extension.linear_a16(empty, weight, bias).shape == (0, 24)
    if capability() == extension.INT8_CAPABILITY:
        qx, sx, weight, bias = int8_operands(0, 24, 128, cuda)
        assert extension.linear_a8(qx, sx, weight, bias, FP16).shape == (0, 24)
        no_outputs = torch.empty(0, 128, dtype=torch.int8, device=cuda)
        qx, sx, *_ = int8_operands(3, 24, 128, cuda)
        extension.int8_product(qx, sx, no_outputs, torch.empty(0, device=cuda), None, qx.new_empty((3, 0), dtype=FP16))
