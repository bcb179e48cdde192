"""Products that decode their weights into a scratch first: a stretch of outputs at a time, small enough to stay in the
L2 cache until the product reads it, and never a whole large weight.

int8 activations meet the integers ``m * (u - z)``, which the scratch holds exactly. Others meet the weight as a layer
of their dtype would hold it: scaled and rounded once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer import extension
from ..layer.formats import WeightFormat
from ..layer.packed_weight import PackedWeight
from ..layer.packing import BLOCK as _BLOCK
from .config import SCRATCH_BYTES, Config, cdiv, columns_per_part
from .decode import BLOCK, HALF_BLOCK, between_halves, load_group_parameters, load_halves, load_halves_as, part_of_block
from .dense_product import dense_product
from .interpreter import interpreting
from .launch import launch
from .operands import Operands

EXPANSION_BLOCK_N = 64
EXPANSION_WARPS = 4


@triton.jit
def expansion_kernel(
    qweight,
    scale,
    group_code,
    expanded,
    first,
    count,
    N,
    K,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``expanded[i, k]``: the weight of output ``first + i``, as an integer if ``expanded`` is int8, else scaled. One
    program decodes one part of a block of BLOCK_N outputs, both halves.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    n = first + tl.where(row < count, row, 0)
    p_low, p_high = load_group_parameters(scale, group_code, n, N, groups, step, BITS, GROUP, PROMOTED, PART)
    stored = qweight, n, K, row_bytes, step, p_low, p_high
    if expanded.dtype.element_ty == tl.int8:
        low, high = load_halves(*stored, BITS, PART, EVEN_K, COMPILED)
    else:
        low, high = load_halves_as(*stored, BITS, PART, EVEN_K, COMPILED, tl.float32)
        if PROMOTED:
            s_low, s_high = p_low, p_high
        else:
            s_low = tl.load(scale + n)
            s_high = s_low
        low = low * s_low[:, None]
        high = high * s_high[:, None]
    _, k = part_of_block(step, BITS, PART)
    k = (k + tl.arange(0, PART))[None, :]
    out = expanded + row.to(tl.int64)[:, None] * K
    inside = (row < count)[:, None]
    tl.store(out + k, low.to(expanded.dtype.element_ty), mask=inside & (k < K))
    between: tl.constexpr = between_halves(BITS, PART)
    tl.store(out + k + between, high.to(expanded.dtype.element_ty), mask=inside & (k + between < K))


@functools.cache
def specialise(fmt: WeightFormat, even: bool, element_bytes: int) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`expansion_kernel`; ``even``: whether K is whole blocks;
    ``element_bytes``: of the scratch.
    """
    constants = dict(
        BITS=fmt.bits,
        GROUP=fmt.group or 0,
        PROMOTED=fmt.promoted,
        EVEN_K=even,
        COMPILED=not interpreting(),
        PART=columns_per_part(fmt),
        BLOCK_N=EXPANSION_BLOCK_N,
    )
    return constants, dict(num_warps=EXPANSION_WARPS * max(1, element_bytes // 2))  # fp32 takes the registers of two


def chunks(out_features: int, in_features: int, element_bytes: int) -> list[tuple[int, int]]:
    """(first output, outputs) of the stretches that are decoded at a time: as few as the scratch allows, equal but for
    the last, each a multiple of 128 outputs.
    """
    if not out_features:
        return []
    largest = max(_BLOCK, SCRATCH_BYTES // (in_features * element_bytes) // _BLOCK * _BLOCK)
    size = cdiv(cdiv(out_features, cdiv(out_features, largest)), _BLOCK) * _BLOCK
    return [(first, min(size, out_features - first)) for first in range(0, out_features, size)]


def expand(weight: PackedWeight, first: int, expanded: torch.Tensor) -> None:
    """Writes ``expanded`` [count, K], contiguous: outputs ``first .. first + count - 1`` of a stored weight, as
    integers if it is int8, else scaled and rounded to its dtype.
    """
    count = expanded.shape[0]
    qweight, scale, group_code, fmt, in_features = weight
    constants, options = specialise(fmt, in_features % BLOCK.value == 0, expanded.element_size())
    parts = HALF_BLOCK.value // constants["PART"]
    launch(
        expansion_kernel,
        (cdiv(count, EXPANSION_BLOCK_N), cdiv(in_features, BLOCK.value) * parts),
        (
            qweight,
            scale,
            group_code,
            expanded,
            first,
            count,
            qweight.shape[0],
            in_features,
            qweight.stride(0),
            fmt.group_count(in_features),
        ),
        constants,
        options,
    )


def expanded_product(operands: Operands, config: Config, multiprocessors: int) -> torch.Tensor:
    """[M, N]; by cuBLAS if ``config`` has no tile."""
    x, y = operands.x, operands.output()
    in_features = x.shape[1]
    out_features = y.shape[1]
    stretches = chunks(out_features, in_features, x.element_size())
    scratch = torch.empty((stretches[0][1], in_features), dtype=x.dtype, device=x.device)
    for first, count in stretches:
        expand(operands.weight, first, scratch[:count])
        product, w = y[:, first : first + count], scratch[:count]
        bias = None if operands.bias is None else operands.bias[first : first + count]
        if config.route == "expanded_cuda":
            scale = operands.weight.scale[first : first + count]
            extension.int8_product(x, operands.sx, w, scale, bias, product, config.instance)
            continue
        if config.block_m:
            scale = operands.weight.scale[first : first + count] if x.dtype == torch.int8 else None
            added = None if operands.added is None else operands.added.outputs(first, count)
            dense_product(x, w, operands.sx, scale, bias, product, config, multiprocessors, added)
            continue
        with torch.no_grad():  # which functions with an output given ask for
            if bias is None:
                torch.mm(x, w.T, out=product)
            elif product.is_contiguous():
                torch.addmm(bias.to(x.dtype), x, w.T, out=product)
            else:  # into a part of the output PyTorch adds the bias as a matrix, behind a rounding (seen on an H200)
                product.copy_(torch.addmm(bias.to(x.dtype), x, w.T))
    return y


def expanded_gradient(grad: torch.Tensor, weight: PackedWeight, grad_x: torch.Tensor) -> torch.Tensor:
    """``grad_x`` [M, K], filled in: ``grad`` [M, N] times the weight, by cuBLAS; all fp32."""
    stretches = chunks(grad.shape[1], grad_x.shape[1], grad.element_size())
    grad_x.zero_()
    scratch = torch.empty(
        (max((count for _, count in stretches), default=0), grad_x.shape[1]), dtype=grad.dtype, device=grad.device
    )
    for first, count in stretches:
        expand(weight, first, scratch[:count])
        with torch.no_grad():
            torch.addmm(grad_x, grad[:, first : first + count], scratch[:count], out=grad_x)
    return grad_x
