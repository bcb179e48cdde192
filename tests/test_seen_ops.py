"""A layer calls its ops where something wants to see them, and nowhere else."""

import torch
from oracle import activations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ditq_kernels import QuantLinear
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
