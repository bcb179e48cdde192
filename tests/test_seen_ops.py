"""A layer calls its ops where something wants to see them, and nowhere else."""

import copy
import warnings

import pytest
import torch
from oracle import activations, generator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_kernels as ditq
from ditq_kernels import QuantLinear, UnsupportedError
from ditq_kernels.layer import ops

CPU = torch.device("cpu")


class _Listed(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.__dict__.setdefault("names", []).append(func.name())
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.__dict__.setdefault("names", []).append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_layer_calls_its_ops_where_something_looks():
    layer, x = QuantLinear.from_linear(torch.nn.Linear(128, 48), "w8a8"), activations(7, 128, torch.float32, CPU)
    wanted = ["ditq::quantize_activation", "ditq::linear_a8"]
    expected = layer(x)
    with _Listed() as listed:
        assert torch.equal(layer(x), expected)
    assert [name for name in listed.names if name.startswith("ditq::")] == wanted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert [event.name for event in profile.events() if event.name.startswith("ditq::")] == wanted
    parts = [layer.qweight.data, layer.scale.data, None, layer.bias.data]
    traced = make_fx(lambda x, *parts: ops.quantized_linear(x, *parts, weight_format="w8", quantizes_input=True))(
        x, *parts
    )
    targets = [str(node.target) for node in traced.graph.nodes if "ditq" in str(node.target)]
    assert targets == ["ditq.quantize_activation.default", "ditq.linear_a8.default"]
    few = make_fx(
        lambda x, *parts: ops.quantized_linear(x, *parts, weight_format="w8", quantizes_input=False), pre_dispatch=True
    )(x, *parts)
    assert [str(node.target) for node in few.graph.nodes if "ditq" in str(node.target)] == ["ditq.linear_a16.default"]
    with _Called() as called:
        assert torch.equal(layer(x), expected)
    assert [name for name in called.names if "ditq" in name] == ["ditq.quantize_activation", "ditq.linear_a8"]
    assert "ditq::linear_a8" in str(torch.jit.trace(layer, (x,), check_trace=False).graph)
    batches = torch.stack([x, 2 * x])
    assert torch.equal(torch.vmap(layer)(batches), layer(batches))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape
    assert layer.to("meta")(x.to("meta")).is_meta


def test_a_layer_does_not_call_its_ops_where_nothing_looks(monkeypatch):
    layer, x = QuantLinear.from_linear(torch.nn.Linear(128, 48), "w8a8"), activations(7, 128, torch.float32, CPU)
    expected = layer(x)
    monkeypatch.setattr(torch.ops, "ditq", None)
    assert torch.equal(layer(x), expected)


FORWARD_SCHEMES = pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4a16_g32"])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("rows", [4, 40])
@FORWARD_SCHEMES
def test_tangents_pass_through_a_layer(scheme, rows, grad):
    """By a transform and by dual numbers, whatever the mode of gradients."""
    layer, x, v = _layer(scheme), *torch.randn(2, rows, 64, generator=generator(3))
    with torch.set_grad_enabled(grad):
        y, tangent = torch.func.jvp(layer, (x,), (v,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v)))
    assert torch.equal(y, layer(x)) and torch.equal(y, dual.primal) and torch.equal(tangent, dual.tangent)
    torch.testing.assert_close(tangent, v @ layer.dequantized_weight().T)


@FORWARD_SCHEMES
def test_tangents_of_gradients_and_gradients_of_gradients(scheme):
    layer, x, v = _layer(scheme), *torch.randn(2, 20, 64, generator=generator(3))
    weight = layer.dequantized_weight()

    def loss(x):
        return (layer(x) ** 2).sum()

    _, found = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    torch.testing.assert_close(found, 2 * v @ weight.T @ weight)
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), x)
    torch.testing.assert_close(second, 2 * v @ weight.T @ weight)


def test_jacobians_and_hessians_in_batches():
    layer, x = _layer("w8a8"), torch.randn(1, 64, generator=generator(3))
    weight = layer.dequantized_weight()
    torch.testing.assert_close(torch.func.jacrev(layer)(x)[0, :, 0], weight)
    found = torch.autograd.functional.hessian(lambda x: (layer(x) ** 2).sum(), x, vectorize=True)
    torch.testing.assert_close(found[0, :, 0], 2 * weight.T @ weight)


@torch.no_grad()
def test_a_residual_in_fp64_stays_so():
    layer, residual = _layer("w8a8").double(), torch.randn(1, 4, 48, dtype=torch.float64)
    found = layer.added_to(residual, torch.zeros(1, 48).double(), torch.randn(1, 4, 64).double())
    assert torch.equal(found, residual)


def test_a_second_tangent_is_refused():
    """PyTorch gives half of it."""
    layer, x = _layer("w8a8"), torch.randn(5, 64)

    def first(x):
        return torch.func.jvp(layer, (x,), (2 * x,))[1]

    with pytest.raises(UnsupportedError, match="forward derivative of a forward derivative"):
        torch.func.jvp(first, (x,), (x,))


INFERENCE = {
    "added_to": lambda layer, x: layer.added_to(torch.zeros(2, 5, 48), torch.ones(2, 48), x),
    "added_to, of the residual": lambda layer, x: layer.added_to(x[..., :48], torch.ones(2, 48), x.detach()),
    "added_to, of a parameter's gate": lambda layer, x: layer.added_to(
        torch.zeros(2, 5, 48), nn.Parameter(x[:, 0, :48].detach(), x.requires_grad), x.detach()
    ),
    "quantize_activation": lambda _, x: ops.quantize_activation(x),
    "gelu_quantize": lambda _, x: ops.gelu_quantize(x),
    "norm_modulate": lambda _, x: ops.norm_modulate(x),
    "norm_modulate_quantize": lambda _, x: ops.norm_modulate_quantize(x),
    "of_silu": lambda _, x: _layer("w8a16").of_silu(x),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_what_is_for_inference_is_not_differentiated_in_silence(name):
    layer, x, call = _layer("w8a8"), torch.randn(2, 5, 64), INFERENCE[name]
    call(layer, x)
    with pytest.raises(UnsupportedError, match="is for inference"):
        call(layer, x.clone().requires_grad_())
    with torch.no_grad():
        call(layer, x.clone().requires_grad_())


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", ["quantize_activation", "gelu_quantize", "norm_modulate", "of_silu"])
def test_what_is_for_inference_takes_no_tangents(name, grad):
    layer, x, call = _layer("w8a8"), torch.randn(2, 5, 64), INFERENCE[name]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        call(layer, x)
        with pytest.raises(UnsupportedError, match="is for inference"):
            call(layer, forward_ad.make_dual(x, x))


@torch.no_grad()
@pytest.mark.parametrize("rows", [4, 40])
@FORWARD_SCHEMES
def test_compiled_layers_lose_no_tangents(scheme, rows):
    layer, x, v = _layer(scheme), *torch.randn(2, rows, 64, generator=generator(3))
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))).tangent
        torch.testing.assert_close(found, v @ layer.dequantized_weight().T)
        torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_a_fused_block_passes_tangents():
    """It runs as it was written then."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    plain = DiTTransformer2DModel(2, 32, 4, 8, num_layers=1, patch_size=2, sample_size=8).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.05)
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        ditq.quantize(model, "w8a8")
    ditq.fuse(fused)
    x, v = torch.randn(2, 2, 4, 8, 8)
    steps, classes = torch.tensor([3, 900]), torch.tensor([1, 7])

    # The attention that PyTorch takes on CPUs has no tangents.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangents = [
            torch.func.jvp(lambda x, model=model: model(x, steps, classes).sample, (x,), (v,))[1]
            for model in (plain, fused)
        ]
    assert tangents[0].norm() > 0
    torch.testing.assert_close(*tangents)


def _layer(scheme):
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(64, 48), scheme)
