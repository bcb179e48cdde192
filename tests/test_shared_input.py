"""Layers that share an input are called as one, and stay the layers that they were."""

import copy
import multiprocessing
import os
import pickle
import sys
import threading

import pytest
import torch
from oracle import assert_product
from torch import nn

from ditq_kernels import QuantLinear
from ditq_kernels.layer import ops, shared_input
from ditq_kernels.layer.formats import RECOMMENDED
from ditq_kernels.layer.quantized_input import QuantizedInput
from ditq_kernels.layer.shared_input import SharedInput

NAMES = ("to_q", "to_k", "to_v")
SCHEMES = (*RECOMMENDED, "w8a8_g32")


def parent(scheme="w4a8_g32", widths=(16, 24, 40), inputs=160, bias=True, amax=3.0):
    torch.manual_seed(0)
    whole = nn.Module()
    for name, width in zip(NAMES, widths, strict=True):
        linear = nn.Linear(inputs, width, bias=bias)
        setattr(whole, name, QuantLinear.from_linear(linear, scheme, input_amax=amax))
    return whole.eval()


def called(whole, x):
    return [layer(x) for layer in whole.children()]


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def storages(whole):
    found = (parameter.untyped_storage() for parameter in whole.parameters())
    return {one.data_ptr(): one.nbytes() for one in found}


@pytest.fixture
def x():
    return torch.randn(7, 160, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def products(monkeypatch):
    """How many outputs each product had."""
    seen = []
    original = QuantLinear.forward

    def forward(self, x):
        seen.append(self.out_features)
        return original(self, x)

    monkeypatch.setattr(QuantLinear, "forward", forward)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_one_product_gives_the_bits_of_all(scheme, bias, x, products):
    whole = parent(scheme, bias=bias)
    expected, state = called(whole, x), {name: part.clone() for name, part in whole.state_dict().items()}
    before = sum(storages(whole).values())
    shared = SharedInput(whole, NAMES)
    assert shared.join()
    products.clear()
    assert same(shared(x), expected) and products == [80]
    assert same(called(whole, x), expected)  # each by itself, too
    after = whole.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    of_input = 2 * 4 if whole.to_q.scheme.static else 0  # ranges, which each layer keeps
    assert sum(storages(whole).values()) <= before and len(storages(whole)) <= len(state) // 3 + of_input
    shared.part()
    assert same(called(whole, x), expected) and len(storages(whole)) == len(state)
    assert all(part.is_contiguous() for part in whole.state_dict().values())


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8_g32"])
@torch.no_grad()
def test_what_is_written_to_a_layer_is_seen(scheme, x):
    other = parent(scheme)
    for layer in other.children():
        layer.requantize(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2)))
        layer.bias += 1
    state = other.state_dict()
    for change in (
        lambda whole: whole.load_state_dict(state),
        lambda whole: whole.load_state_dict(copy.deepcopy(state), assign=True),
        lambda whole: [layer.requantize(layer.weight.flip(0)) for layer in whole.children()],
        lambda whole: [layer.weight.data.mul_(2) for layer in whole.children()],
        lambda whole: [layer.bias.add_(1) for layer in whole.children()],
    ):
        alone, whole = parent(scheme), parent(scheme)
        shared = SharedInput(whole, NAMES)
        shared.join()
        change(alone)
        assert not same(shared(x), called(alone, x))
        change(whole)
        assert same(shared(x), called(alone, x))


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
@torch.no_grad()
def test_a_requantized_layer_comes_back(x):
    whole = parent()
    shared = SharedInput(whole, NAMES)
    shared.join()
    before, weight = shared(x), whole.to_k.dequantized_weight()
    whole.to_k.requantize(weight + 0.1)
    assert not torch.equal(shared(x)[1], before[1]) and torch.equal(shared(x)[0], before[0])
    whole.to_k.requantize(weight)
    assert same(shared(x), before)


@torch.no_grad()
def test_layers_that_move_are_joined_again(x, products):
    whole = parent()
    shared = SharedInput(whole, NAMES)
    shared.join()
    expected = called(parent().to(torch.bfloat16), x)
    whole.to(torch.bfloat16)
    assert shared.joined().bias.dtype == torch.bfloat16
    products.clear()
    assert same(shared(x), expected) and products == [80]
    whole.to("meta")
    assert shared.joined().qweight.is_meta and [part.is_meta for part in shared(x.to("meta"))] == [True] * 3
    whole.to_empty(device="cpu").load_state_dict(parent().state_dict())
    assert same(shared(x), expected)
    for layer in whole.children():  # as offloading does, that puts other memory behind parameters
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
    whole.to_v.qweight.data.zero_()
    products.clear()
    assert same(shared(x), called(whole, x)) and products[0] == 80 and len(storages(whole)) == 4


@pytest.fixture
def switched_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_come_first_together_join_once(x, switched_often):
    original = parent("w8a8", widths=(64, 64, 64))
    expected = called(original, x)
    for _ in range(100):
        whole = copy.deepcopy(original)
        shared, found, together = SharedInput(whole, NAMES), [], threading.Barrier(4)

        def call(shared=shared, found=found, together=together):
            together.wait()
            with torch.no_grad():
                found.append(shared(x))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(same(one, expected) for one in found)
        with torch.no_grad():
            whole.to_v.scale.mul_(2)
            assert same(shared(x), called(whole, x)), "a write to a layer is not seen"


@torch.no_grad()
def test_copies_are_joined_by_themselves(x):
    whole = parent()
    whole.shared = SharedInput(whole, NAMES)
    whole.shared.join()
    expected = whole.shared(x)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert same(other.shared(x), expected)
        other.to_q.qweight.zero_()
        assert not same(other.shared(x), expected) and same(whole.shared(x), expected)
        assert not set(storages(other)) & set(storages(whole))


def test_layers_are_called_one_by_one_where_joining_would_hide_something(x, products):
    whole = parent()
    shared = SharedInput(whole, NAMES)
    shared.join()
    entering = x.clone().requires_grad_()
    products.clear()
    sum(part.sum() for part in shared(entering)).backward()
    assert products == [16, 24, 40] and entering.grad is not None
    assert all(layer.bias.grad is not None for layer in whole.children())
    with torch.no_grad():
        expected, seen = shared(x), []
        for install in (
            lambda: whole.to_k.register_forward_hook(lambda *_: seen.append("hook")),
            lambda: whole.to_k.register_forward_pre_hook(lambda *_: seen.append("pre-hook")),
        ):
            handle = install()
            assert same(shared(x), expected) and len(seen) == 1
            handle.remove()
            seen.clear()
        whole.to_k.forward = lambda x: torch.zeros(7, 24)  # as accelerate puts itself before a layer's own
        assert shared(x)[1].eq(0).all()
        del whole.to_k.forward
        products.clear()
        assert same(shared(x), expected) and products == [80]
        whole.to_k = nn.Linear(160, 24)  # and as peft puts an adapter in its place
        assert torch.equal(shared(x)[1], whole.to_k(x)) and same(shared(x)[::2], expected[::2])


def test_what_is_joined_in_inference_mode_can_be_differentiated_after(x):
    whole = parent()
    shared = SharedInput(whole, NAMES)
    with torch.inference_mode():
        whole.to(torch.bfloat16)
        assert shared.join()
        expected = shared(x.to(torch.bfloat16))
    entering = x.to(torch.bfloat16).requires_grad_()
    found = shared(entering)
    sum(part.sum() for part in found).backward()
    assert same(found, expected) and entering.grad is not None and whole.to_q.bias.grad is not None


@torch.no_grad()
def test_what_cannot_be_joined_stays_apart(x):
    whole = parent()
    whole.to_v = QuantLinear.from_linear(nn.Linear(160, 40), "w8a8")
    shared = SharedInput(whole, NAMES)
    assert not shared.join() and same(shared(x), called(whole, x))
    whole = parent("w8a8_static")
    whole.to_q.input_amax.fill_(2.0)
    assert not SharedInput(whole, NAMES).join()
    whole = parent()
    whole.to_q.to(torch.bfloat16)
    assert not SharedInput(whole, NAMES).join()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8_g32", "w8a8_static"])
@torch.no_grad()
def test_an_input_that_is_quantized_already(scheme, x):
    whole = parent(scheme)
    expected = called(whole, x)
    codes = ops.quantize_activation(x, whole.to_q.input_amax)
    given = QuantizedInput(*codes, x.view(1, 7, 160).shape, x.dtype)
    assert same([part[0] for part in called(whole, given)], expected)
    shared = SharedInput(whole, NAMES)
    shared.join()
    assert same([part[0] for part in shared(given)], expected)
    with pytest.raises(ValueError, match="input of width 160 given to a layer of K = 96"):
        QuantLinear.from_linear(nn.Linear(96, 8), scheme, input_amax=1.0)(given)
    with pytest.raises(
        TypeError, match="a layer in w4a16 multiplies activations as they are, and was given int8 codes"
    ):
        QuantLinear.from_linear(nn.Linear(160, 8), "w4a16")(given)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16_g32"])
@torch.no_grad()
def test_the_layer_of_silu(scheme, x):
    layer = parent(scheme).to_q
    assert_product(layer.of_silu(x), nn.functional.silu(x), layer.dequantized_weight(), layer.bias)
    assert torch.equal(layer.of_silu(x[None])[0], layer.of_silu(x))
    with pytest.raises(TypeError, match=r"quantizes its input: give it silu\(x\)"):
        parent("w8a8").to_q.of_silu(x)


@torch.no_grad()
def test_a_compiler_sees_one_product(x):
    whole = parent()
    whole.shared = SharedInput(whole, NAMES)
    whole.shared.join()
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "ditq" in str(node.target)])
        return graph

    compiled = torch.compile(lambda x: whole.shared(x), fullgraph=True, backend=keep)
    assert same(compiled(x), whole.shared(x))
    assert graphs == [["ditq.quantize_activation", "ditq.linear_a8"]]


@torch.no_grad()
def test_what_older_versions_have_saved_is_called(x):
    whole = parent()
    shared = SharedInput(whole, NAMES)
    older = SharedInput.__new__(SharedInput)
    older.__setstate__({"parent": whole, "names": NAMES, "_joined": None, "_where": (), "_members": []})
    assert same(older(x), shared(x)) and same(pickle.loads(pickle.dumps(shared))(x), shared(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system forks no processes")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not():
    with shared_input._joining():
        process = multiprocessing.get_context("fork").Process(target=_join)
        process.start()
        process.join(30)
        hung = process.is_alive()
        process.kill()
    assert not hung and process.exitcode == 0


@torch.no_grad()
def _join():
    torch.set_num_threads(1)
    assert SharedInput(parent(), NAMES).join()
