"""Models that replay CUDA graphs: what is captured anew, what is called as it is, and that results are the call's.

Without a GPU, in place of a graph stands one that remembers which function was captured and calls it again: what it has
written, and where, is as a graph's.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from small_transformers import small_transformer
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.model import cuda_graphs


class Graph:
    """Calls what was captured again, and writes the results into the tensors of the first call."""

    def __init__(self):
        self.call, self.result = None, None

    def replay(self):
        Graph.replays += 1
        found, written = (
            [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]
            for value in (self.call(), self.result)
        )
        for one, other in zip(written, found, strict=True):
            one.copy_(other)


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    may = cuda_graphs._may_replay
    monkeypatch.setattr(cuda_graphs, "_may_replay", lambda tensors: may([Seen(one) for one in tensors]))
    capture = cuda_graphs._capture
    captured = []

    def noted(model, original, leaves, form, where):
        found = capture(model, original, leaves, form, where)
        graph = found.replay.__self__
        given = iter(found.inputs)
        args, kwargs = torch.utils._pytree.tree_unflatten(
            [next(given) if isinstance(one, torch.Tensor) else one for one in leaves], form
        )
        graph.call, graph.result = (lambda: original(model, *args, **kwargs)), found.result
        captured.append(graph)
        return found

    monkeypatch.setattr(cuda_graphs, "_capture", noted)
    with torch.no_grad():
        yield captured


class Seen:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor):
        self.tensor = tensor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, scale=1, extra=None):
        self.calls += 1
        return {"y": self.linear(x) * scale, "text": "as it is"}


def test_a_kind_of_input_is_captured_once(no_gpu):
    model = ditq.graph(Model())
    for scale in (1, 1, 2, 1):
        x = torch.randn(5, 4)
        found = model(x, scale=scale)
        assert torch.equal(found["y"], model.linear(x) * scale) and found["text"] == "as it is"
    assert len(no_gpu) == 2 and Graph.replays == 4
    model(torch.randn(6, 4))
    model(torch.randn(6, 4).double().float().t().contiguous().t())
    assert len(no_gpu) == 4


def test_results_are_the_callers(no_gpu):
    model = ditq.graph(Model())
    x = torch.randn(5, 4)
    first = model(x)["y"]
    kept = first.clone()
    model(x + 1)
    assert torch.equal(first, kept)
    x.zero_()
    assert torch.equal(model(x)["y"], model.linear(torch.zeros(5, 4)))


def test_weights_that_move_are_noticed(no_gpu):
    model, x = ditq.graph(Model()), torch.randn(5, 4)
    model(x)
    model.linear.weight.mul_(2)  # in place: a graph reads them where they are
    assert torch.equal(model(x)["y"], model.linear(x)) and len(no_gpu) == 1
    model.linear.weight.data = model.linear.weight.data + 1
    assert torch.equal(model(x)["y"], model.linear(x)) and len(no_gpu) == 2
    model.linear = nn.Linear(4, 3)
    assert torch.equal(model(x)["y"], model.linear(x)) and len(no_gpu) == 3


def test_what_is_not_replayed(no_gpu):
    model, x = ditq.graph(Model()), torch.randn(5, 4)
    with torch.enable_grad():
        model(x)["y"].sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)["y"].dtype == torch.bfloat16
    model(x, extra=[{1, 2}])  # not hashable
    handle = model.linear.register_forward_hook(lambda *_: None)
    model(x)
    assert not no_gpu and model.calls == 4
    handle.remove()
    heard = []
    model.register_forward_pre_hook(lambda *_: heard.append(1))
    model(x)
    assert len(no_gpu) == 1 and heard


def test_few_graphs_are_kept(no_gpu):
    model = ditq.graph(Model())
    for rows in range(1, 9):
        model(torch.randn(rows, 4))
    assert len(vars(model)["_ditq_graphs"].captured) == cuda_graphs.MOST_GRAPHS
    model(torch.randn(8, 4))
    assert len(no_gpu) == 8
    model(torch.randn(1, 4))
    assert len(no_gpu) == 9


def test_copies_have_graphs_of_their_own(no_gpu):
    model, x = ditq.graph(ditq.graph(Model())), torch.randn(5, 4)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.linear.weight.zero_()
        assert torch.equal(other(x)["y"], other.linear(x)) and not torch.equal(other(x)["y"], model(x)["y"])
    assert type(ditq.ungraph(model)) is Model and "_ditq_graphs" not in vars(model)
    before = model.calls
    model(x)
    assert model.calls == before + 1


@pytest.mark.parametrize("name", ["DiT", "FLUX", "SD3", "Wan"])
def test_fused_transformers(name, no_gpu):
    model, inputs = small_transformer(name)
    ditq.quantize(model, "w8a8", fused=True, progress=False)
    expected = model(**inputs)
    ditq.graph(model)
    for _ in range(2):
        found = model(**inputs)
        assert type(found) is type(expected) and torch.equal(found[0], expected[0])
    assert len(no_gpu) == 1 and Graph.replays == 2
    again = {key: one * 0.5 if torch.is_tensor(one) and one.is_floating_point() else one for key, one in inputs.items()}
    assert torch.equal(model(**again)[0], ditq.ungraph(model)(**again)[0])


def test_a_pipelines_denoisers(no_gpu):
    class Pipeline:
        def __init__(self):
            self.components = {"transformer": Model(), "vae": Model(), "scheduler": object()}

    pipe = ditq.graph(Pipeline())
    assert "_ditq_graphs" in vars(pipe.components["transformer"]) and "_ditq_graphs" not in vars(pipe.components["vae"])
    with pytest.raises(TypeError, match=r"must be an nn\.Module or a pipeline"):
        ditq.graph("transformer")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DiT", "FLUX"])
def test_on_a_gpu(name, monkeypatch):
    monkeypatch.undo()
    model, inputs = small_transformer(name)
    ditq.quantize(model, "w8a8", fused=True, progress=False)
    model.cuda()
    inputs = {key: one.cuda() if torch.is_tensor(one) else one for key, one in inputs.items()}
    expected = model(**inputs)[0]
    ditq.graph(model)
    for _ in range(3):
        assert torch.equal(model(**inputs)[0], expected)
    other = {key: one * 0.5 if torch.is_tensor(one) and one.is_floating_point() else one for key, one in inputs.items()}
    found = model(**other)[0]
    assert torch.equal(found, ditq.ungraph(model)(**other)[0])
