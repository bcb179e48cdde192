import copy

import pytest
import torch
from oracle import activations, generator, linear
from torch import nn

from ditq_kernels import SCHEMES, QuantLinear
from ditq_kernels.layer.formats import RECOMMENDED
from ditq_kernels.layer.ops import quantize_activation

CPU = torch.device("cpu")
recommended = pytest.mark.parametrize("scheme", RECOMMENDED)


def quantized(scheme, in_features=200, out_features=48, **arguments):
    return QuantLinear.from_linear(linear(out_features, in_features, CPU), scheme, input_amax=40.0, **arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_is_near_the_original_layers(scheme):
    """Quantization error, not kernel error: a coarse bound that a wrong scale, group or sign would break by far."""
    original = linear(48, 200, CPU)
    x = activations(33, 200, torch.float32, CPU)
    layer = QuantLinear.from_linear(original, scheme, input_amax=x.abs().max())
    weight_error = (layer.dequantized_weight() - original.weight).norm() / original.weight.norm()
    input_error = 0
    if layer.scheme.activation.bits == 8:
        codes, scales = quantize_activation(x, layer.input_amax)
        input_error = (codes * scales.unsqueeze(1) - x).norm() / x.norm()
    y, expected = layer(x), original(x)
    assert 0 < (y - expected).norm() / expected.norm() <= 2 * (weight_error + input_error)


@recommended
def test_it_is_a_linear_layer_of_any_leading_shape(scheme):
    layer = quantized(scheme)
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (48, 200)
    x = activations(30, 200, torch.float32, CPU)
    flat = layer(x)
    assert torch.equal(layer(x.reshape(2, 5, 3, 200)), flat.view(2, 5, 3, 48))
    assert layer(x[0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 48)


@recommended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_exact_through_casts(scheme, dtype):
    layer = quantized(scheme)
    before = copy.deepcopy(layer)
    layer.to(dtype)
    assert torch.equal(layer.dequantized_weight(), before.dequantized_weight())
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == dtype
    for name in ("scale", "input_amax"):
        part = getattr(layer, name)
        assert part is None or (part.dtype == torch.float32 and torch.equal(part, getattr(before, name)))
    assert layer(activations(3, 200, dtype, CPU)).dtype == dtype


@recommended
def test_only_the_bias_is_trainable(scheme):
    layer = quantized(scheme)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    x = activations(9, 200, torch.float32, CPU).requires_grad_()
    upstream = torch.randn(9, 48, generator=generator(1))
    layer(x).backward(upstream)
    assert torch.equal(x.grad, upstream @ layer.dequantized_weight())
    assert torch.equal(layer.bias.grad, upstream.sum(0))


@recommended
def test_nbytes_counts_what_is_stored(scheme):
    layer = quantized(scheme, in_features=1152, out_features=64)
    stored = [p for name, p in layer.named_parameters() if name != "bias"]
    assert layer.nbytes == sum(p.numel() * p.element_size() for p in stored)
    limit = 4.5 if layer.scheme.weight.bits == 4 else 8.5
    assert layer.bits_per_weight <= limit


@recommended
def test_state_dict_round_trip(scheme):
    layer = quantized(scheme)
    other = QuantLinear.empty(200, 48, scheme, bias=True, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    x = activations(5, 200, torch.float32, CPU)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,)])
def test_a_result_may_be_changed_in_place(shape):
    layer = QuantLinear.from_linear(nn.Linear(64, 8), "w8a8")
    x = torch.randn(*shape, requires_grad=True)
    y = layer(x)
    y += 1
    y.mul_(2)
    y.sum().backward()
    expected = torch.autograd.grad(2 * layer(x).sum(), x)[0]
    assert y.shape == (*shape[:-1], 8) and torch.allclose(x.grad, expected)


def test_what_it_says_of_itself():
    for bias in (True, False):
        said = repr(QuantLinear.from_linear(nn.Linear(64, 8, bias=bias), "w8a8"))
        assert said == f"QuantLinear(in_features=64, out_features=8, bias={bias}, scheme=w8a8)"


def test_without_bias():
    original = nn.Linear(128, 16, bias=False)
    layer = QuantLinear.from_linear(original, "w4a8_g32")
    x = activations(4, 128, torch.float32, CPU)
    assert layer.bias is None
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_autocast_decides_the_dtype():
    layer = quantized("w8a8")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(activations(3, 200, torch.float32, CPU)).dtype == torch.bfloat16


def test_reaching_for_compensation_and_clip():
    moment = torch.eye(200) + 0.9
    assert not torch.equal(quantized("w4a16_g128", input_moment=moment).qweight, quantized("w4a16_g128").qweight)
    assert not torch.equal(quantized("w4a16_g128", clip=0.8).qweight, quantized("w4a16_g128").qweight)


def test_bad_input_is_named():
    layer = quantized("w8a8")
    with pytest.raises(ValueError, match="input of width 199 given to a layer of K = 200"):
        layer(torch.zeros(3, 199))
    with pytest.raises(TypeError, match=r"floating-point, got torch\.int64"):
        layer(torch.zeros(3, 200, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"floating-point, got torch\.int64"):
        layer(torch.zeros(3, 200, dtype=torch.int64))
    with pytest.raises(ValueError, match="the layer is on cpu but the input is on meta; move one"):
        layer(torch.zeros(3, 200, device="meta"))
    with pytest.raises(
        ValueError, match=r"w8a8_static needs a calibrated input_amax: run ditq.calibrate first, or use w8a8"
    ):
        QuantLinear.from_linear(nn.Linear(128, 8), "w8a8_static")
    with pytest.raises(ValueError, match="finite and positive, got 0"):
        QuantLinear.from_linear(nn.Linear(128, 8), "w8a8_static", input_amax=0.0)
    with pytest.raises(ValueError, match="unknown scheme 'int8'"):
        QuantLinear.from_linear(nn.Linear(128, 8), "int8")
    with pytest.raises(TypeError, match=r"unquantized nn.Linear, got QuantLinear"):
        QuantLinear.from_linear(layer, "w8a8")
    with pytest.raises(TypeError, match="from_linear"):
        QuantLinear(128, 8)


@pytest.mark.parametrize(("scheme", "reach"), [("w8a8_static", 40.0), ("w8a8", 100.0), ("w8a16", 100.0)])
def test_what_a_calibrated_reach_does(scheme, reach):
    """Through a layer that changes nothing: inputs beyond the reach saturate, and only with a static scale."""
    layer = nn.Linear(32, 32, bias=False)
    layer.weight.data.copy_(torch.eye(32))
    found = QuantLinear.from_linear(layer, scheme, input_amax=40.0)
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([1.0, 20.0, 40.0, 80.0, -100.0])
    y = found(x)
    assert (y - x.clamp(-reach, reach)).abs().max() <= 0.51 * reach / 127
    # What 8 bits cannot hold, 16 can; and only they.
    assert torch.equal(y, x) == (scheme == "w8a16")
    assert found.input_amax is None or found.input_amax.tolist() == [40.0]


def test_sums_that_int32_does_not_hold_are_refused():
    most = 132_104  # products of 127 and -128
    linear = torch.nn.Linear(most + 1, 1, bias=False)
    with pytest.raises(ValueError, match=r"K = 132105 has more products of int8 than int32 holds.*w8a8_g128"):
        QuantLinear.from_linear(linear, "w8a8")
    with pytest.raises(ValueError, match="K = 132105"):
        QuantLinear.empty(most + 1, 1, "w4a8_g128", bias=False, dtype=torch.float32)
    x, codes = (torch.full((1, most), code, dtype=torch.int8) for code in (127, -128))
    for scheme in ("w8a16", "w8a8_g128"):
        QuantLinear.from_linear(linear, scheme)
    exact = torch.ops.ditq.linear_a8(x, torch.ones(1), codes, torch.ones(1), None, None, "w8", torch.int32)
    assert exact.item() == -most * 127 * 128
    wider = torch.nn.functional.pad(codes, (0, 1))
    with pytest.raises(ValueError, match="K = 132105"):
        torch.ops.ditq.linear_a8(wider, torch.ones(1), wider, torch.ones(1), None, None, "w8", torch.int32)


@pytest.mark.parametrize("shape", [(0, 48), (64, 0)])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g32"])
def test_nothing_is_quantized_of_an_empty_weight(scheme, shape):
    with pytest.raises(ValueError, match="holds nothing to quantize"):
        QuantLinear.from_linear(torch.nn.Linear(*shape, bias=False), scheme)


def test_a_single_number_is_no_input():
    with pytest.raises(ValueError, match="a single number given to a layer of K = 64"):
        QuantLinear.from_linear(torch.nn.Linear(64, 8), "w8a8")(torch.tensor(1.0))
