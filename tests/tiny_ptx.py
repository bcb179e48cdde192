"""Kernels of a few instructions, written by hand, for the tests of what executes PTX."""

from __future__ import annotations

import numpy as np
import torch

from ditq_kernels.inspect.executor.global_memory import GlobalMemory, Region
from ditq_kernels.inspect.executor.machine import Machine
from ditq_kernels.inspect.executor.parser import parse
from ditq_kernels.inspect.executor.program import translate

# Every kernel finds: its thread's number ``t``, ``lane`` and ``warp``; ``memory``, an array in shared memory, and
# ``at``, 4 bytes for each thread in it; for each tensor its address, by the tensor's name, and ``NAME_at``, likewise.
HEADER = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry tiny({parameters})
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<99>;
.reg .b64 %d<99>;
.reg .b32 t, lane, warp, at;
.reg .b64 offset;
mov.u32 t, %tid.x;
and.b32 lane, t, 31;
shr.u32 warp, t, 5;
mov.b32 %r98, memory;
shl.b32 at, t, 2;
cvt.u64.u32 offset, at;
add.u32 at, at, %r98;
"""
TENSOR = """
.reg .b64 {name}, {name}_at;
ld.param.u64 {name}, [{name}_given];
add.u64 {name}_at, {name}, offset;
"""


def ptx(body: str, names=(), threads: int = 64) -> str:
    """A module with one kernel of a block of ``threads``, which is given tensors of these names."""
    given = ", ".join(f".param .u64 {name}_given" for name in names)
    header = HEADER.format(parameters=given, threads=threads)
    return header + "".join(TENSOR.format(name=name) for name in names) + body + "\nret;\n}\n"


def run(
    body: str,
    threads: int = 64,
    shared: int = 4096,
    unit=None,
    extra=None,
    counters=None,
    blocks: int = 1,
    cluster: int = 1,
    **tensors: torch.Tensor,
) -> Machine:
    """The machine after ``blocks`` have executed ``body``; tensors are changed in place.

    Args:
        unit: how sums of matrix instructions are cut.
        extra: parameters that are no tensors.
        counters: what counts meanwhile.
    """
    extra = extra or {}
    text = ptx(body, tensors, threads)
    if extra:
        more = ", ".join(f".param .align 64 .b8 {name}[128]" for name in extra)
        text = text.replace(")\n.reqntid", f"{', ' if tensors else ''}{more})\n.reqntid", 1)
    regions = [Region(name, tensor) for name, tensor in tensors.items()]
    parameters = {f"{region.name}_given": np.array([region.first], np.uint64) for region in regions}
    memory = GlobalMemory(regions)
    program, settings = translate(parse(text)), dict(matrix_unit=unit, counters=counters, cluster=cluster)
    machine = Machine(program, parameters | extra, (blocks, 1, 1), threads, shared, memory, **settings)
    machine.launch()
    return machine
