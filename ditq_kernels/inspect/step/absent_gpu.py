"""A GPU that is not there: tensors without contents in place of those on it, and what PyTorch and our kernels would be
told of it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ...kernels.config import shared_memory
from ...kernels.device import Device, standing_in
from ..bounds import GPUS
from ..counted import REGISTERS, RESIDENT

DEVICE = torch.device("cpu")  # that tensors seem to be on: of a GPU, PyTorch would want more than its name

_library = torch.library.Library("ditq_absent_gpu", "DEF")
_library.define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> Tensor")


@torch.library.register_fake("ditq_absent_gpu::attention", lib=_library)
def _attention_fake(query, key, value, mask):
    # As PyTorch's flash attention lays it out: what was transposed before is transposed back without a copy.
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


ATTENTION = torch.ops.ditq_absent_gpu.attention.default


def _attention(query, key, value, attn_mask=None, *_, **__):
    return torch.ops.ditq_absent_gpu.attention(query, key, value, attn_mask)


def device(arch: int) -> Device:
    """What a configuration of our kernels is chosen by."""
    return Device(GPUS[arch].name, arch, GPUS[arch].multiprocessors)


def properties(arch: int) -> Any:
    """As PyTorch gives them of a GPU of architecture ``arch``."""
    gpu = GPUS[arch]
    return SimpleNamespace(
        name=gpu.name,
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=RESIDENT[arch].threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared_memory(arch),
        total_memory=80 << 30,
        L2_cache_size=gpu.l2_size,
        gcnArchName="",
        uuid="",
    )


@contextlib.contextmanager
def absent_gpu(arch: int) -> Iterator[FakeTensorMode]:
    """Within the ``with`` block our kernels are chosen for a GPU of architecture ``arch``, and PyTorch makes tensors
    without contents, and attention one operation, as it is on a GPU.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        warnings.catch_warnings(),
        mode,
        torch.no_grad(),
        standing_in(device(arch)),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # 0, as of all on meta
        yield mode


def placed(value: Any, mode: FakeTensorMode) -> Any:
    """What is on the meta device in ``value``, as tensors that seem to be somewhere."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda one: FakeTensor(mode, one, DEVICE) if one.is_meta else one, value
    )


def place(model: nn.Module, mode: FakeTensorMode) -> None:
    """Make parameters and buffers of ``model`` that are on the meta device tensors that seem to be somewhere."""
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, one.detach(), DEVICE), requires_grad=False)
        module._buffers.update(placed(dict(module._buffers), mode))
