"""The weight of a quantized layer, as other code sees it: what reads it gets its values, what writes is not lost."""

import copy
import warnings

import pytest
import torch
from oracle import activations, generator, linear
from torch import nn

from ditq_kernels import QuantLinear, UnsupportedError
from ditq_kernels.layer import reference
from ditq_kernels.layer.linear import REPLACED_KEPT, RequantizationWarning
from ditq_kernels.layer.weight_view import WeightView

CPU = torch.device("cpu")
N, K = 48, 160
schemes = pytest.mark.parametrize("scheme", ["w8a8", "w8a16_g64", "w4a8_g128", "w4a16_g32", "w4a16"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def quantized(scheme="w4a8_g128", dtype=torch.float32):
    return QuantLinear.from_linear(linear(N, K, CPU).to(dtype), scheme)


def bits(layer):
    return [part if part is None else part.clone() for part in layer.packed_weight[:3]]


def same(one, other):
    return all(a is b if a is None else torch.equal(a, b) for a, b in zip(one, other, strict=True))


def change(dtype=torch.float32, size=0.02, seed=0):
    return (size * torch.randn(N, K, generator=generator(seed))).to(dtype)


def test_its_shape_dtype_and_device_are_known_without_decoding(monkeypatch):
    layer = quantized(dtype=torch.bfloat16)
    monkeypatch.setattr(reference, "dequantize", None)
    weight = layer.weight
    assert weight.shape == (N, K) and weight.dtype == torch.bfloat16 and weight.device == layer.qweight.device
    assert weight.dim() == 2 and weight.numel() == N * K and weight.T.shape == (K, N) and not weight.requires_grad
    assert isinstance(weight, torch.Tensor) and weight.data[3:].detach().shape == (N - 3, K)
    with pytest.raises(TypeError):
        weight + 1


@schemes
def test_what_reads_it_gets_its_values(scheme):
    layer = quantized(scheme)
    weight, plain = layer.weight, layer.dequantized_weight()
    x = activations(7, K, torch.float32, CPU)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, plain))
    assert torch.equal(weight.t()[5:9, ::2], plain.t()[5:9, ::2]) and torch.equal(weight.chunk(3)[1], plain.chunk(3)[1])
    assert torch.equal(torch.cat([weight, weight.detach()]), torch.cat([plain, plain]))
    assert torch.equal(torch.zeros(N, K).copy_(weight), plain) and weight.tolist() == plain.tolist()
    for own in (weight.clone(), weight.to(torch.float64), copy.deepcopy(weight), weight.view(-1) * 2):
        assert type(own) is torch.Tensor
        own.zero_()  # a tensor of its own
    assert torch.equal(layer.dequantized_weight(), plain)


WRITES = {
    "add_": lambda weight: weight.add_(1),
    "fill_": lambda weight: weight.fill_(0),
    "copy_": lambda weight: weight.copy_(torch.zeros(N, K)),
    "+=": lambda weight: weight.__iadd__(1),
    "an element": lambda weight: weight.__setitem__((0, 0), 1.0),
    "a row": lambda weight: weight[0].zero_(),
    "a view of a view": lambda weight: weight.t()[2:4].unsqueeze(0).mul_(2),
    "a chunk": lambda weight: weight.chunk(3)[1].zero_(),
    "out=": lambda weight: torch.add(torch.zeros(N, K), 1, out=weight),
    "an initialisation": nn.init.normal_,
    "a detached one": lambda weight: weight.detach().zero_(),
    "one of a list": lambda weight: torch._foreach_add_([torch.zeros(N, K), weight], 1.0),
    "requires_grad_": lambda weight: weight.requires_grad_(),
    "requires_grad": lambda weight: setattr(weight, "requires_grad", True),
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_writes_to_it_raises(write):
    layer = quantized()
    before = bits(layer)
    with pytest.raises(UnsupportedError, match="quantized to w4a8_g128"):
        write(layer.weight)
    assert same(before, bits(layer))


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
def test_lists_that_share_nothing_are_written_one_by_one():
    layers = [quantized(), quantized("w8a8")]
    read = quantized("w8a16").weight
    wanted = [layer.weight + read for layer in layers]
    torch._foreach_add_([layer.weight.data for layer in layers], [read, read])
    for layer, one in zip(layers, wanted, strict=True):
        expected = quantized(layer.scheme)
        expected.requantize(one)
        assert same(bits(layer), bits(expected))


def test_another_tensor_cannot_take_its_place():
    layer = quantized()
    for value in (torch.zeros(N, K), nn.Parameter(torch.zeros(N, K)), None):
        with pytest.raises(UnsupportedError, match="requantize"):
            layer.weight = value
    with pytest.raises(UnsupportedError, match="requantize"):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(N, K)))


WRITES_TO_DATA = {
    "+=": lambda layer, x: layer.weight.data.__iadd__(x),
    "add_": lambda layer, x: layer.weight.data.add_(x),
    "=": lambda layer, x: setattr(layer.weight, "data", layer.weight.data.clone() + x),
    "copy_": lambda layer, x: layer.weight.data.copy_(layer.weight + x),
    "[...] =": lambda layer, x: layer.weight.data.__setitem__(slice(None), layer.weight + x),
    "a view": lambda layer, x: layer.weight.data.t().add_(x.t()),
    "a list": lambda layer, x: torch._foreach_add_([layer.weight.data], [x]),
    "halves in a list": lambda layer, x: torch._foreach_add_(layer.weight.data.chunk(2), x.chunk(2)),
}


@schemes
@pytest.mark.parametrize("write", WRITES_TO_DATA.values(), ids=WRITES_TO_DATA)
def test_what_writes_to_its_data_quantizes_the_layer_again(scheme, write):
    layer = quantized(scheme)
    wanted = layer.dequantized_weight() + change()
    places = [part.data_ptr() for part in layer.parameters()]
    with pytest.warns(RequantizationWarning, match=rf"quantized to {scheme} was changed.*is lost"):
        write(layer, change())
    plain = nn.Linear(K, N, bias=False)
    plain.weight = nn.Parameter(wanted)
    assert same(bits(layer), bits(QuantLinear.from_linear(plain, scheme)))
    assert places == [part.data_ptr() for part in layer.parameters()], (
        "a captured graph would go on with the old weight"
    )


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
@schemes
@dtypes
@pytest.mark.parametrize("size", [0.002, 0.05, 1.0])
def test_a_change_taken_back_gives_the_bits_before(scheme, dtype, size):
    layer = quantized(scheme, dtype)
    states = [bits(layer)]
    for seed in range(3):
        layer.weight.data += change(dtype, size, seed)
        states.append(bits(layer))
    assert size < 0.05 or not any(same(states[0], one) for one in states[1:])
    for seed in reversed(range(3)):
        layer.weight.data -= change(dtype, size, seed)
        states.pop()
        assert same(bits(layer), states[-1])
    for _ in range(2 * REPLACED_KEPT):  # as often as one likes
        layer.weight.data += change(dtype, size)
        layer.weight.data -= change(dtype, size)
    assert same(bits(layer), states[0])


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
@schemes
def test_another_change_is_not_taken_for_the_one_taken_back(scheme):
    layer = quantized(scheme)
    before = bits(layer)
    layer.weight.data += change()
    other = layer.dequantized_weight() - change()
    other[5, 7] += 0.5
    layer.weight.data = other
    step = 0.5 / 7 * other[5].abs().max()
    assert not same(bits(layer), before) and abs(layer.weight[5, 7] - other[5, 7]) <= step


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
def test_a_view_of_itself_may_be_written():
    layer = QuantLinear.from_linear(linear(64, 64, CPU), "w8a16_g64")
    transposed = layer.dequantized_weight().T.clone()
    layer.weight.data = layer.weight.t()
    assert (layer.dequantized_weight() - transposed).abs().max() <= transposed.abs().max() / 127
    layer.requantize(layer.weight)
    assert (layer.dequantized_weight() - transposed).abs().max() <= transposed.abs().max() / 127


def test_a_weight_that_cannot_be_stored_changes_nothing():
    layer = quantized()
    before = bits(layer)
    for wrong, said in ((torch.zeros(K, N), "cannot replace it"), (torch.full((N, K), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=said):
            layer.requantize(wrong)
    with pytest.raises(ValueError, match="offloaded"):
        copy.deepcopy(layer).to("meta").requantize(torch.zeros(N, K))
    with pytest.raises(ValueError, match="cannot become"):
        layer.weight.data = torch.zeros(K, N)
    assert same(before, bits(layer))


def test_it_is_decoded_in_compiled_code():
    layer = quantized()

    def gated(x):  # as T5's feed-forward layers do
        return layer(x.to(layer.weight.dtype)) @ layer.weight

    x = activations(5, K, torch.float32, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RequantizationWarning)
        assert torch.allclose(torch.compile(gated, backend="aot_eager", fullgraph=True)(x), gated(x))


def test_stored_parts_take_no_gradient_and_no_other_type():
    model = nn.Sequential(quantized(), nn.Linear(N, 3))
    before = bits(model[0])
    with pytest.raises(UnsupportedError, match="train an adapter"):
        model.requires_grad_(True)
    model.requires_grad_(False)
    model.type(torch.float16)
    assert same(before, bits(model[0])) and model[0].bias.dtype == model[0].dtype == torch.float16
    model.double()
    assert same(before, bits(model[0])) and model[0].weight.dtype == torch.float64
    kind = type(model[0].qweight)
    assert type(copy.deepcopy(model).to("meta")[0].qweight) is type(copy.deepcopy(model[0].qweight)) is kind
    assert isinstance(model[0].weight, WeightView)


@pytest.mark.parametrize("far", ["nowhere", "in one place", "a little everywhere"])
def test_a_weight_comes_back_only_if_it_is_near_in_every_way(far):
    """Twice what is allowed in one weight of a channel shows little in its mean square, and the other way round."""
    layer = QuantLinear.from_linear(linear(8, 256, CPU), "w8a16")
    before, first = copy.deepcopy(layer), layer.dequantized_weight()
    with pytest.warns(RequantizationWarning):
        layer.requantize(first + torch.randn(8, 256, generator=torch.Generator().manual_seed(0)))
    allowed = layer._replaced[-1]
    off = torch.zeros(8, 256)
    if far == "in one place":
        off[3, 5] = 2 * allowed.off_largest[3]
        assert off[3].square().mean().sqrt() < allowed.off_rms[3]
    elif far == "a little everywhere":
        off[3] = 1.2 * allowed.off_rms[3]
        assert off[3].max() < allowed.off_largest[3]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer.requantize(first + off)
    back = torch.equal(layer.qweight, before.qweight) and torch.equal(layer.scale, before.scale)
    assert back == (far == "nowhere") and bool(said) == (far != "nowhere")
