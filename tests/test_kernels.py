"""The Triton kernels against the reference: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch
from oracle import COMPILED, SHAPES, activations, assert_product, linear

from ditq_kernels import SCHEMES, QuantLinear, kernels
from ditq_kernels.kernels import activation, config, dispatch
from ditq_kernels.layer import reference
from ditq_kernels.layer.error_budget import PLAIN
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.gated_residual import GatedResidual

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned_memory")

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-N{}-K{}".format(*shape))
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)


def in_formats_and_types(shapes):
    """Each format on each shape, in one type by turns: interpreting takes time, and `inspect --execute` computes with
    every compiled form in its own type. Where kernels are compiled, in all types.
    """
    cases = [
        pytest.param(
            fmt, shape, dtype, id="{}-M{}-N{}-K{}-{}".format(fmt.name, *shape, str(dtype).removeprefix("torch."))
        )
        for turn, fmt in enumerate(WEIGHT_FORMATS.values())
        for place, shape in enumerate(shapes)
        for dtype in (DTYPES if COMPILED else [DTYPES[(turn + place) % len(DTYPES)]])
    ]
    return pytest.mark.parametrize(("fmt", "shape", "dtype"), cases)


def stored(fmt, out_features, in_features, device):
    """The weight and the bias of a layer in ``fmt``."""
    layer = QuantLinear.from_linear(
        linear(out_features, in_features, device), fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
    )
    return layer.packed_weight, layer.bias.detach()


@pytest.mark.parametrize("static", [False, True], ids=["token", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 64, 200, 1152, 8192, 8200])
def test_activation_codes_are_bit_exact(columns, dtype, static, device):
    x = activations(9, columns, dtype, device)
    x[4, -1] = float("nan")
    x[5, 0] = float("inf")
    x[6] *= 1e-6
    amax = torch.tensor([3.0], device=device) if static else None
    codes, scales = kernels.quantize_activation(x, amax)
    expected_codes, expected_scales = reference.quantize_activation(x, amax)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))


def test_activations_may_have_any_strides(device):
    x = activations(64, 24, torch.bfloat16, device).T
    assert x.stride(1) != 1
    for actual, expected in zip(kernels.quantize_activation(x), reference.quantize_activation(x), strict=True):
        assert torch.equal(actual, expected)


def test_the_smallest_reach_is_the_references():
    assert activation.SMALLEST_AMAX.value == reference.SMALLEST_AMAX


@shapes
@formats
def test_integer_accumulators_are_bit_exact(fmt, shape, device):
    rows, out_features, in_features = shape
    weight, _ = stored(fmt, out_features, in_features, device) if not (fmt.group or 0) > in_features else (None, None)
    if weight is None or fmt.promoted:
        pytest.skip("this format has no single accumulator" if fmt.promoted else "the group is larger than K")
    qx, sx = reference.quantize_activation(activations(rows, in_features, torch.float32, device))
    actual, expected = (module.linear_a8(qx, sx, weight, None, torch.int32) for module in (kernels, reference))
    assert actual.dtype == torch.int32 and torch.equal(actual, expected)


@in_formats_and_types(SHAPES)
def test_int8_activation_products(fmt, shape, dtype, device):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, device)
    qx, sx = reference.quantize_activation(activations(rows, in_features, dtype, device))
    x = qx.double() * sx.double().unsqueeze(1)
    w = reference.dequantize(weight)
    expected = reference.linear_a8(qx, sx, weight, bias, dtype)
    assert_product(expected, x, w, bias)
    actual = kernels.linear_a8(qx, sx, weight, bias, dtype)
    if fmt.promoted:  # fp32 sums over the groups, in an order of each one's own
        assert_product(actual, x, w, bias)
    else:  # an exact sum, and behind it roundings in an order that is part of the contract
        assert torch.equal(actual, expected)


@in_formats_and_types([shape for shape in SHAPES if shape[0] > 1])
def test_products_added_to_a_residual(fmt, shape, dtype, device):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, device)
    qx, sx = reference.quantize_activation(activations(rows, in_features, dtype, device))
    samples = next(number for number in (3, 2, 1) if rows % number == 0)
    residual = activations(rows, out_features + 2, dtype, device)[:, 1:-1]
    gate = activations(samples, 3 * out_features, dtype, device)[:, out_features : 2 * out_features]
    added = GatedResidual(residual, gate)
    y = kernels.linear_a8(qx, sx, weight, bias, dtype)
    found = kernels.linear_a8(qx, sx, weight, bias, dtype, added=added)
    expected = residual.double() + gate.double().repeat_interleave(rows // samples, 0) * y.double()
    budget = 4 * torch.finfo(torch.float32).eps * (residual.double().abs() + (expected - residual.double()).abs())
    budget += 0 if dtype == torch.float32 else 2.0**-8 * expected.abs() * (1 if dtype == torch.bfloat16 else 0.125)
    assert ((found.double() - expected).abs() <= budget + 1e-30).all()
    if not fmt.promoted:
        assert torch.equal(found, reference.linear_a8(qx, sx, weight, bias, dtype, added=added))


@in_formats_and_types(SHAPES)
def test_16_bit_activation_products(fmt, shape, dtype, device):
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features, device)
    x = activations(rows, in_features, dtype, device)
    w = reference.dequantize(weight)
    arithmetic = config.arithmetic(dispatch.chosen(x, out_features, fmt, dtype), x.element_size())
    for module, does in ((kernels, arithmetic), (reference, PLAIN)):
        assert_product(module.linear_a16(x, weight, bias), x, w, bias, does)


@in_formats_and_types([shape for shape in SHAPES if 1 < shape[0] < 200])
def test_gradients_of_the_input(fmt, shape, dtype, device):
    rows, out_features, in_features = shape
    weight, _ = stored(fmt, out_features, in_features, device)
    grad = activations(rows, out_features, dtype, device)
    w = reference.dequantize(weight)
    arithmetic = config.arithmetic(config.GRADIENT_TILE, grad.element_size())
    for module, does in ((kernels, arithmetic), (reference, PLAIN)):
        assert_product(module.grad_input(grad, weight), grad, w.T, arithmetic=does)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_products_of_every_second_column(rows, device):
    weight, bias = stored(WEIGHT_FORMATS["w4_g32"], 48, 160, device)
    x = activations(rows, 320, torch.bfloat16, device)[:, ::2]
    assert x.stride(1) == 2
    found, expected = (kernels.linear_a16(given, weight, bias) for given in (x, x.contiguous()))
    assert torch.equal(found, expected)


@formats
def test_identity_activations_decode_the_weight(fmt, device):
    """With one-hot rows the product is the weight itself: every code, group and half-block lands where it belongs."""
    in_features = 320
    weight, _ = stored(fmt, 48, in_features, device)
    decoded = kernels.linear_a16(torch.eye(in_features, device=device), weight, None)
    assert torch.equal(decoded, reference.dequantize(weight).T)
    few = kernels.linear_a16(torch.eye(in_features, device=device)[100:116], weight, None)
    assert torch.equal(few, decoded[100:116])


@pytest.mark.parametrize("name", ["w8a8", "w8a8_g128_static", "w4a8_g32", "w4a16_g128"])
def test_empty_batches(name, device):
    layer = QuantLinear.from_linear(linear(24, 128, device), name, input_amax=4.0)
    weight = layer.packed_weight
    empty = torch.empty(0, 128, device=device)
    assert kernels.linear_a16(empty, weight, layer.bias).shape == (0, 24)
    assert [part.shape for part in kernels.quantize_activation(empty)] == [(0, 128), (0,)]
    assert kernels.grad_input(torch.empty(0, 24, device=device), weight).shape == (0, 128)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", ["w8a8", "w8a8_g64", "w4a8_g128", "w4a8_static"])
def test_a_broken_row_gives_a_row_of_nan(name, rows, device):
    layer = QuantLinear.from_linear(linear(24, 128, device), name, input_amax=4.0)
    x = activations(rows, 128, torch.float32, device)
    x[2, 5] = float("inf")
    qx, sx = kernels.quantize_activation(x, layer.input_amax)
    y = kernels.linear_a8(qx, sx, layer.packed_weight, layer.bias, torch.float32)
    broken = torch.isnan(y)
    assert broken[2].all() and not broken[:2].any() and not broken[3:].any()


@pytest.mark.parametrize("name", ["w8a8_g128", "w4a8_g128", "w8a16_g128"])
def test_the_same_input_gives_the_same_bits(name, device):
    layer = QuantLinear.from_linear(linear(72, 384, device), name).to(device)
    weight = layer.packed_weight
    x = activations(33, 384, torch.bfloat16, device)
    first, second = (kernels.linear_a16(x, weight, layer.bias) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("w4a8")])
def test_the_assembly_decoder_on_the_gpu(name, device):
    fmt = SCHEMES[name].weight
    weight, _ = stored(fmt, 128, 384, device)
    qx = torch.randint(-127, 128, (300, 384), dtype=torch.int8, device=device)
    ones = torch.ones(300, device=device)
    actual, expected = (module.linear_a8(qx, ones, weight, None, torch.int32) for module in (kernels, reference))
    assert torch.equal(actual, expected)
