"""Kernels of a call as PyTorch's compiler schedules it: what it fuses is one, and operations that it calls are what
they are in eager.

The compiler decides which operations become one kernel before it writes any, by rules that depend on the GPU; it is
asked then, and stopped. Of its own matrix products none is considered: PyTorch takes cuBLAS' unless it is told to tune.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .absent_gpu import properties
from .operations import kernels_of
from .tensors import memory_of, tensors_in
from .work import ACTIVATION, PASS, WEIGHT, Work

GPU = torch.device("cuda", 0)
_OLDEST = 2, 11  # of PyTorch, that can be asked
_INPUT = re.compile(r"arg(\d+)_1")


class _Scheduled(Exception):
    """Enough is known."""


@contextlib.contextmanager
def _stood_in(arch: int) -> Iterator[None]:
    """The compiler finds a GPU of ``arch``."""
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import joint_graph
    from torch.utils import _triton

    found = properties(arch)

    class Interface(device_interface.CudaInterface):
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: found)
        get_compute_capability = staticmethod(lambda device=None: arch)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)
        Worker = SimpleNamespace(
            set_device=lambda device: None, current_device=lambda: 0, get_device_properties=lambda device=None: found
        )

    cpu = torch.device("cpu")  # on which patterns are traced that are looked for
    with contextlib.ExitStack() as stack:
        # Whether there is Triton for a GPU is asked once; here it is another question, and afterwards again.
        _triton.has_triton.cache_clear()
        stack.callback(_triton.has_triton.cache_clear)
        prepare = joint_graph.lazy_init
        stack.enter_context(patch.object(joint_graph, "lazy_init", lambda *device: prepare(*(cpu for _ in device))))
        device_interface.get_interface_for_device("cpu")  # else the others would be registered later
        stack.enter_context(
            patch.dict(device_interface.device_interfaces, {name: Interface for name in ("cuda", "cuda:0")})
        )
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda device=None: found))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)))
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: 0))
        yield


def scheduled(function: nn.Module, inputs: dict[str, Any], arch: int) -> list[Work]:
    """What ``function(**inputs)`` launches when it is compiled as one graph, within :func:`.absent_gpu.absent_gpu`.

    Raises:
        ImportError: if PyTorch is too old to be asked.
        RuntimeError: if it made several graphs of one.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        raise ImportError(f"what PyTorch {torch.__version__} would compile cannot be traced; pip install 'torch>=2.11'")
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    graphs: list[list[Work]] = []

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        weights = {place for place, one in enumerate(examples) if isinstance(one, nn.Parameter)}

        def schedule(operations: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            def after_fusion(nodes: list[Any]) -> list[Any]:
                graphs.append(list(_kernels(nodes, weights)))
                raise _Scheduled

            with config.patch(_post_fusion_custom_pass=after_fusion, fx_graph_cache=False, shape_padding=False):
                return compile_fx(*_on_gpu(operations, inputs))

        return aot_module_simplified(graph, examples, fw_compiler=schedule)

    torch.compiler.reset()
    with _stood_in(arch):
        try:
            torch.compile(function, fullgraph=True, backend=backend)(**inputs)
        except Exception:  # the compiler's own, with ours in it
            if not graphs:
                raise
    if len(graphs) != 1:
        raise RuntimeError(f"PyTorch {torch.__version__} scheduled {len(graphs)} graphs of one")
    return graphs[0]


def _on_gpu(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """``graph`` and ``inputs`` as they are where all of it is on a GPU."""
    given = [one for one in inputs if isinstance(one, FakeTensor)]
    with unset_fake_temporarily():
        empty = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta") for one in given]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    moved = dict(zip(map(id, given), (FakeTensor(given[0].fake_mode, one, GPU) for one in empty), strict=True))
    return graph, [moved.get(id(one), one) for one in inputs]


def _kernels(nodes: Sequence[Any], weights: set[int]) -> Iterator[Work]:
    for node in nodes:
        kind = type(node).__name__
        if kind == "NopKernelSchedulerNode":
            continue
        if kind != "ExternKernelSchedulerNode":
            yield _fused(node, weights)
            continue
        if type(node.node).__name__ == "MultiOutput":
            continue
        called = node.node.get_origin_node()
        if called is None:  # of what gives several tensors
            called = next(one for one in node.node.origins if one.target is node.node.op_overload)
        yield from _called(called, weights)


def _fused(node: Any, weights: set[int]) -> Work:
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    origins = (one.node.get_origin_node() for one in node.get_nodes())
    operations = (getattr(one.target, "overloadpacket", None) for one in origins if one is not None)
    name = "_".join(dict.fromkeys(one.__name__ for one in operations if one is not None))
    return Work(name or "fused", PASS, tuple((_role(buffer, weights), int(size)) for buffer, size in accesses.items()))


def _role(name: str, weights: set[int]) -> str:
    match = _INPUT.fullmatch(name)
    return WEIGHT if match and int(match.group(1)) in weights else ACTIVATION


def _called(origin: torch.fx.Node, weights: set[int]) -> Iterator[Work]:
    """Of an operation that the compiler leaves as it is."""
    args, kwargs = torch.fx.map_arg((origin.args, origin.kwargs), lambda one: one.meta["val"])
    given = set()
    for one in origin.graph.find_nodes(op="placeholder"):
        if _role(one.target, weights) == WEIGHT:
            given |= {memory_of(tensor) for tensor in tensors_in(one.meta["val"])}
    yield from kernels_of(origin.target, args, dict(kwargs), origin.meta["val"], given)
