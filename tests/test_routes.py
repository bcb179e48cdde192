"""Every way to compute a product, asked for by its configuration, against the fp64 oracle: interpreted on the CPU,
compiled where there is a GPU.
"""

import dataclasses

import pytest
import torch
from oracle import COMPILED, activations, assert_product, linear

from ditq_kernels import QuantLinear
from ditq_kernels.kernels import config, dense_product, dispatch, expansion, gradient, in_loop_product, small_product
from ditq_kernels.kernels.config import CONFIGS, EXTENSION_ROUTES, OVERLAPPED_ROUTES, Config
from ditq_kernels.kernels.dense_product import dense_product_kernel
from ditq_kernels.kernels.expansion import expansion_kernel
from ditq_kernels.kernels.in_loop_product import in_loop_product_kernel
from ditq_kernels.layer import reference
from ditq_kernels.layer.formats import WEIGHT_FORMATS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# One small tile of each form; the interpreter's arithmetic does not depend on the tile. (M, N, K): ragged everywhere,
# rows for which descriptors work and for which they do not, more tiles than programs.
SMALL = (Config("small", 1, 4, num_warps=1), Config("small", 2, 8, num_warps=1), Config("small", 4, 4, num_warps=1))
IN_LOOP = Config("in_loop", 16, 64, num_stages=2)
INT8 = Config("int8", 32, 64, 128, num_stages=2)
EXPANDED = Config("expanded", 32, 64, 64, num_stages=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((17, 80, 130), (33, 72, 320), (129, 64, 256))
if COMPILED:  # see oracle.ON_A_GPU
    SMALL, SHAPES = SMALL[1:], SHAPES[:2]
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-N{}-K{}".format(*shape))


def with_descriptors(tile: Config) -> list[Config]:
    return [tile, dataclasses.replace(tile, descriptors=True)]


def stored(fmt, out_features, in_features, device):
    scheme = fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
    layer = QuantLinear.from_linear(linear(out_features, in_features, device), scheme)
    return layer.packed_weight, layer.bias.detach()


def check_a8(fmt, shape, tile, device, dtypes=(torch.float32, torch.bfloat16)):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, device)
    qx, sx = reference.quantize_activation(activations(rows, in_features, torch.float32, device))
    x, w = qx.double() * sx.double().unsqueeze(1), reference.dequantize(weight)
    for dtype in dtypes:
        y = dispatch.linear_a8(qx, sx, weight, bias, dtype, tile)
        if fmt.promoted:
            assert_product(y, x, w, bias, config.arithmetic(tile, qx.element_size()))
        else:  # the sum is exact, and what follows is rounded in the reference's order
            assert torch.equal(y, reference.linear_a8(qx, sx, weight, bias, dtype))
    if torch.float32 in dtypes and not fmt.promoted:
        accumulator = dispatch.linear_a8(qx, sx, weight, None, torch.int32, tile)
        assert torch.equal(accumulator, reference.linear_a8(qx, sx, weight, None, torch.int32))


def check_a16(fmt, shape, tile, device, dtypes=(torch.bfloat16, torch.float16), silu=False):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, device)
    w = reference.dequantize(weight)
    for dtype in dtypes:
        x, b = activations(rows, in_features, dtype, device), None if dtype == torch.bfloat16 else bias
        y = dispatch.linear_a16(x, weight, b, silu, tile)
        assert_product(y, x, w, b, config.arithmetic(tile, x.element_size()), silu)


@pytest.mark.parametrize("tile", SMALL, ids=str)
@formats
def test_small_products(fmt, tile, device):
    check_a16(fmt, (tile.block_m, 13, 200), tile, device, DTYPES)
    check_a16(fmt, (tile.block_m, 5, 1152), tile, device, (torch.bfloat16,))


@pytest.mark.parametrize("tile", [SMALL[1], IN_LOOP, Config("expanded")], ids=str)
@pytest.mark.parametrize("name", ["w8", "w8_g64", "w4_g128"])
def test_silu_on_the_input(name, tile, device):
    check_a16(WEIGHT_FORMATS[name], (tile.block_m or 20, 40, 320), tile, device, silu=True)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)  # it has a program for each tile, however many
@formats
def test_products_decoded_in_the_loop(fmt, shape, device):
    check_a8(fmt, shape, IN_LOOP, device)
    check_a16(fmt, shape, IN_LOOP, device)


@pytest.mark.parametrize("tile", with_descriptors(INT8), ids=str)
@shapes
def test_int8_products(shape, tile, device):
    check_a8(WEIGHT_FORMATS["w8"], shape, tile, device)


@pytest.mark.parametrize("turn", range(len(WEIGHT_FORMATS)), ids=list(WEIGHT_FORMATS))
def test_expanded_products(turn, device):
    # What is multiplied has been decoded before: by descriptors or not, and of which shape, has nothing to do with the
    # format.
    fmt, shape = list(WEIGHT_FORMATS.values())[turn], SHAPES[turn % len(SHAPES)]
    for tile in with_descriptors(EXPANDED):
        if fmt.two_level:
            check_a8(fmt, shape, tile, device)
        check_a16(fmt, shape, tile, device)


@shapes
@formats
def test_products_expanded_for_cublas(fmt, shape, device):
    check_a16(fmt, shape, Config("expanded"), device, DTYPES)


@formats
def test_fp32_outputs_of_int8_products_are_the_references_bit_for_bit(fmt, device):
    """Groups in ascending order, then activation scale, channel scale and bias, each operation rounded once."""
    tiles = [IN_LOOP] + [INT8] * (fmt.name == "w8") + [EXPANDED] * fmt.two_level
    for shape in ((17, 80, 130), (33, 72, 384)):
        weight, bias = stored(fmt, *shape[1:], device)
        qx, sx = reference.quantize_activation(activations(shape[0], shape[2], torch.float32, device))
        expected = reference.linear_a8(qx, sx, weight, bias, torch.float32)
        for tile in tiles:
            tile = dataclasses.replace(tile, block_k=128) if tile.route == "expanded" else tile
            assert torch.equal(dispatch.linear_a8(qx, sx, weight, bias, torch.float32, tile), expected), tile


def test_int8_products_are_compiled_without_fused_multiply_adds():
    """Which would round once where the reference rounds twice; the interpreter does not show it."""
    for fmt in WEIGHT_FORMATS.values():
        _, options = in_loop_product.specialise(IN_LOOP, fmt, torch.float32, True, False, 90, True)
        assert options["enable_fp_fusion"] is False
    assert dense_product.specialise(INT8, torch.float32, True)[1]["enable_fp_fusion"] is False


def test_few_rows_of_fp32_are_summed_alike_by_all_lanes():
    """A multiply-add fused into the sum over lanes gives each lane another sum."""
    for dtype in DTYPES:
        _, options = small_product.specialise(SMALL[0], WEIGHT_FORMATS["w8"], False, dtype)
        assert options["enable_fp_fusion"] is (dtype != torch.float32)


@formats
def test_decoding_in_the_loop_is_exact(fmt, device):
    """With one-hot rows the product is the weight itself: every code, group and half-block lands where it belongs."""
    in_features = 320
    weight, _ = stored(fmt, 48, in_features, device)
    one_hot, ones = torch.eye(in_features, dtype=torch.int8, device=device), torch.ones(in_features, device=device)
    y = dispatch.linear_a8(one_hot, ones, weight, None, torch.float32, IN_LOOP)
    assert torch.equal(y, reference.dequantize(weight).T)


@pytest.mark.parametrize("fmt", [WEIGHT_FORMATS["w8_g32"], WEIGHT_FORMATS["w4_g128"]], ids=str)
def test_gradients_in_fp32_are_summed_over_stretches(fmt, device, monkeypatch):
    monkeypatch.setattr(expansion, "SCRATCH_BYTES", 150 * 256 * 4)
    weight, _ = stored(fmt, 300, 256, device)
    grad = activations(20, 300, torch.float32, device)
    w = reference.dequantize(weight)
    found = gradient.grad_input(grad, weight)
    assert_product(found, grad, w.T)


@pytest.mark.parametrize("tile", [EXPANDED, Config("expanded")], ids=str)
def test_the_scratch_is_filled_a_stretch_at_a_time(tile, device, monkeypatch):
    monkeypatch.setattr(expansion, "SCRATCH_BYTES", 150 * 256 * 2)
    assert expansion.chunks(300, 256, 2) == [(0, 128), (128, 128), (256, 44)]
    largest = []
    original = expansion.expand
    monkeypatch.setattr(expansion, "expand", lambda *args: (largest.append(args[-1].numel()), original(*args)))
    check_a16(WEIGHT_FORMATS["w4_g64"], (20, 300, 256), tile, device, (torch.bfloat16,))
    assert max(largest) == 128 * 256
    if tile.block_m:
        check_a8(WEIGHT_FORMATS["w4_g128"], (20, 300, 256), tile, device)


@pytest.mark.parametrize("element_bytes", [1, 2])
@pytest.mark.parametrize("features", [(1152, 1152), (18432, 3072), (3072, 15360), (40, 64), (3072, 3072)])
def test_stretches_are_even_and_fit_the_scratch(features, element_bytes):
    out_features, in_features = features
    stretches = expansion.chunks(out_features, in_features, element_bytes)
    assert [first for first, _ in stretches] == [sum(n for _, n in stretches[:i]) for i in range(len(stretches))]
    assert sum(count for _, count in stretches) == out_features
    assert all(first % 128 == 0 for first, _ in stretches)
    assert max(count for _, count in stretches) * in_features * element_bytes <= config.SCRATCH_BYTES
    counts = [count for _, count in stretches]
    assert max(counts) - min(counts[:-1], default=max(counts)) == 0


@formats
def test_expansion_is_the_decoded_weight(fmt, device):
    weight, _ = stored(fmt, 150, 200, device)
    for dtype in DTYPES:
        scratch = torch.empty(22, 200, dtype=dtype, device=device)
        expansion.expand(weight, 128, scratch)
        assert torch.equal(scratch, reference.dequantize(weight)[128:].to(dtype))
    if fmt.two_level:
        scratch = torch.empty(22, 200, dtype=torch.int8, device=device)
        expansion.expand(weight, 128, scratch)
        assert torch.equal(scratch, reference.decode(weight)[128:])


@pytest.mark.parametrize(
    "tile", [dataclasses.replace(INT8, descriptors=True), *CONFIGS["overlapped"]], ids=lambda tile: str(tile)
)
def test_operands_that_descriptors_cannot_read_are_read_by_pointers(tile, device):
    """Rows that begin between 16-byte boundaries: K = 130, and a first element one byte off."""
    fmt = WEIGHT_FORMATS["w8"]
    weight, bias = stored(fmt, 72, 128, device)
    shifted = torch.randint(-127, 128, (20, 145), dtype=torch.int8, device=device)[:, 1:129]
    sx = torch.ones(20, device=device)
    y, expected = (
        f(shifted, sx, weight, bias, torch.float32, *more)
        for f, more in ((dispatch.linear_a8, (tile,)), (reference.linear_a8, ()))
    )
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("activation_bytes", [1, 2])
@formats
def test_every_valid_configuration_on_the_gpu(fmt, activation_bytes, device):
    """As the tuning sweep runs them, on a shape with ragged tiles; one type of output each, for each would be compiled:
    `ditq inspect --execute` computes with all.
    """
    for rows in (1, 3, 16, 100, 700):
        shape = (rows, 1160, 1152)
        x = torch.empty(rows, 1152, dtype={1: torch.int8, 2: torch.float16}[activation_bytes], device=device)
        for tile in config.candidates(dispatch.problem_of(x, 1160, fmt)):
            if activation_bytes == 1:
                check_a8(fmt, shape, tile, device, (torch.bfloat16,))
            else:
                check_a16(fmt, shape, tile, device, (torch.float16,))


@pytest.mark.gpu
def test_stretches_that_the_extension_multiplies(device, monkeypatch):
    """Each writes to a part of the output, whose rows lie apart."""
    monkeypatch.setattr(expansion, "SCRATCH_BYTES", 150 * 640)
    fmt, shape = WEIGHT_FORMATS["w4_g128"], (300, 264, 640)
    possible = config.candidates(dispatch.problem_of(torch.empty(300, 640, dtype=torch.int8, device=device), 264, fmt))
    tiles = [tile for tile in possible if tile.route == "expanded_cuda"]
    if not tiles:
        pytest.skip("the extension is not built, or has no such product for this GPU")
    for tile in tiles:
        check_a8(fmt, shape, tile, device, (torch.bfloat16,))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w8", "w8_g128", "w4_g128"])
def test_products_can_be_captured_in_a_cuda_graph(name, device):
    fmt = WEIGHT_FORMATS[name]
    weight, bias = stored(fmt, 1152, 1152, device)
    for rows in (1, 16, 300, 4096):
        x = activations(rows, 1152, torch.bfloat16, device)
        expected = dispatch.linear_a16(x, weight, bias)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dispatch.linear_a16(x, weight, bias)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w8", "w4_g128"])
def test_nothing_is_compiled_when_only_m_changes(name, device):
    fmt = WEIGHT_FORMATS[name]
    weight, bias = stored(fmt, 1152, 1152, device)
    kernels = (dense_product_kernel, in_loop_product_kernel, expansion_kernel)

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(rows):
        x = activations(rows, 1152, torch.bfloat16, device)
        dispatch.linear_a16(x, weight, bias)
        dispatch.linear_a8(*reference.quantize_activation(x), weight, bias, torch.bfloat16)

    for rows in (512, 2048):
        run(rows)
        before = compiled()
        for fewer in (1, 7, 16, 111):
            run(rows - fewer)
        assert compiled() == before


def test_every_route_has_a_case_here():
    tested = {tile.route for tile in (*SMALL, IN_LOOP, INT8, EXPANDED)}
    # Gluon has no interpreter: test_overlapped_product.py.
    assert tested | set(EXTENSION_ROUTES) | set(OVERLAPPED_ROUTES) == set(CONFIGS)
