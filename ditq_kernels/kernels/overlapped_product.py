"""The int8 product on Hopper whose matrix instructions overlap: with the copies of the next operands, with each other,
and with the epilogue of the tile before.

Triton waits for every int8 product before it goes on (it keeps wgmma in flight for fp32 sums alone), so this kernel is
in Gluon, Triton's language one level below, where waiting is the program's. One warp fetches, and never waits for a
product; consumers multiply, and keep one product in flight while they issue the next. Of two consumers each has tiles
of its own, and they take turns: while one stores its tile, the other multiplies.

Every handover is an mbarrier: a stage is *full* when the copies into it have arrived and *empty* when no product reads
it any more; the *turn* is a consumer's when the other one has issued its products.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..layer.gated_residual import GatedResidual
from .config import CONSUMER_WARPS, SWIZZLE_BYTES, Config, cdiv
from .epilogue import gated, store_tile
from .launch import launch
from .tile_order import tile_position

INSTRUCTION_OUTPUTS = 128  # 256, which Hopper has, do not lower for int8
# Of a thread: what one warp that copies needs, and what then is left for each of eight that multiply.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = gl.constexpr(24), gl.constexpr(240)
WARPGROUP_WARPS = gl.constexpr(4)
STORE_BYTES = gl.constexpr(16)  # of a thread at once


@gluon.constexpr_function
def _warpgroups_across(block_n, warps):
    """They stand side by side where that leaves each 128 outputs, so that a thread has few columns, whose factors it
    holds.
    """
    return max(1, min(warps // WARPGROUP_WARPS.value, block_n // INSTRUCTION_OUTPUTS))


@gluon.constexpr_function
def _layout_of_sums(block_n, warps):
    """How a tile's sums lie in registers."""
    across = _warpgroups_across(block_n, warps)
    return gl.NVMMADistributedLayout([3, 0], [warps // across, across], [16, min(block_n, INSTRUCTION_OUTPUTS), 32])


@gluon.jit
def _fetch(x, w, left, right, full, empty, M, N, K, STAGES: gl.constexpr):
    """Fills stage after stage, tile after tile, for whichever consumer comes to it."""
    BLOCK_M: gl.constexpr = left.shape[1]
    BLOCK_N: gl.constexpr = right.shape[1]
    BLOCK_K: gl.constexpr = left.shape[2]
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_m, first_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)  # of the first phase, nobody is waited for
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(x, [first_m, k], full.index(stage), left.index(stage))
            tma.async_copy_global_to_shared(w, [first_n, k], full.index(stage), right.index(stage))
            step += 1


@gluon.jit
def _multiply(
    consumer: gl.constexpr,
    left,
    right,
    full,
    empty,
    turn,
    parts,
    added,
    y,
    stride_y,
    M,
    N,
    K,
    RAW: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """Every tile of ``consumer``: multiplied in its turn, then stored."""
    BLOCK_M: gl.constexpr = left.shape[1]
    BLOCK_N: gl.constexpr = right.shape[1]
    BLOCK_K: gl.constexpr = left.shape[2]
    sums: gl.constexpr = _layout_of_sums(BLOCK_N, gl.num_warps())
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    step = consumer * steps
    others = 1 - consumer  # parity of the phase in which the other one had its turn; at first it is the first one's
    for tile in range(gl.program_id(0) + consumer * gl.num_programs(0), tiles, CONSUMERS * gl.num_programs(0)):
        total = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, sums)
        if CONSUMERS > 1:
            mbarrier.wait(turn.index(consumer), others)
        stage, phase, before = step % STAGES, step // STAGES & 1, 0
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            total = warpgroup_mma(left.index(stage), right.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, (total,))
            if k > 0:
                mbarrier.arrive(empty.index(before))
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if CONSUMERS > 1:  # while the last product is still in flight, so that the next is issued behind it
            mbarrier.arrive(turn.index(1 - consumer))
        total = warpgroup_mma_wait(0, (total,))
        mbarrier.arrive(empty.index(before))
        step += CONSUMERS * steps
        others ^= 1
        first_m, first_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N)
        _store(total, first_m, first_n, parts, added, y, stride_y, M, N, RAW)


@gluon.constexpr_function
def _rows_of_threads(block_n, element_bytes, warps):
    """A layout in which a warp stores whole rows, or as much of one as it can at once."""
    each = STORE_BYTES.value // element_bytes
    across = min(32, block_n // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _of_rows(pointer, m, M):
    return gl.load(pointer + m, mask=m < M, other=0)[:, None]


@gluon.jit
def _of_columns(pointer, n, N):
    return gl.load(pointer + n, mask=n < N, other=0)[None, :]


@gluon.jit
def _store(total, first_m, first_n, parts, added, y, stride_y, M, N, RAW: gl.constexpr):
    """One tile, scaled, biased, added to what it is added to, and stored: by halves of its columns, whose factors would
    take too many registers at once, unless each warpgroup has a half.
    """
    BLOCK_M: gl.constexpr = total.shape[0]
    HALF: gl.constexpr = total.shape[1] // 2
    if _warpgroups_across(total.shape[1], gl.num_warps()) == 1:
        low, high = gl.split(total.reshape([BLOCK_M, 2, HALF]).permute((0, 2, 1)))
        sums: gl.constexpr = _layout_of_sums(HALF, gl.num_warps())
        low, high = gl.convert_layout(low, sums, True), gl.convert_layout(high, sums, True)
        _store_columns(low, first_m, first_n, parts, added, y, stride_y, M, N, RAW)
        _store_columns(high, first_m, first_n + HALF, parts, added, y, stride_y, M, N, RAW)
    else:
        _store_columns(total, first_m, first_n, parts, added, y, stride_y, M, N, RAW)


@gluon.jit
def _store_columns(total, first_m, first_n, parts, added, y, stride_y, M, N, RAW: gl.constexpr):
    sx, scale, bias = parts
    residual, stride_residual, gate, stride_gate, rows_per_gate = added
    BLOCK_M: gl.constexpr = total.shape[0]
    BLOCK_N: gl.constexpr = total.shape[1]
    sums: gl.constexpr = _layout_of_sums(BLOCK_N, gl.num_warps())
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, sums))
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, sums))
    value = total
    if not RAW:  # as in epilogue, but a thread loads each factor once
        value = total.to(gl.float32)
        if sx is not None:
            value = value * _of_rows(sx, m, M)
        if scale is not None:
            value = value * _of_columns(scale, n, N)
        if bias is not None:
            value = value + _of_columns(bias, n, N).to(gl.float32)
    m, n = m[:, None], n[None, :]
    element_bytes: gl.constexpr = y.dtype.element_ty.primitive_bitwidth // 8
    if element_bytes == 2:  # four threads have 32 bytes of a row of sums, a sector, of 4-byte elements only
        rows: gl.constexpr = _rows_of_threads(BLOCK_N, element_bytes, gl.num_warps())
        value = gl.convert_layout(value.to(y.dtype.element_ty), rows)
        m = (first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows)))[:, None]
        n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, rows)))[None, :]
    if residual is not None:
        value = gated(value, y, residual, stride_residual, gate, stride_gate, rows_per_gate, m, n, M, N)
    store_tile(y, stride_y, value, m, n, M, N)


@gluon.jit(do_not_specialize=["M", "rows_per_gate"])
def overlapped_product_kernel(
    x,
    w,
    sx,
    scale,
    bias,
    residual,
    gate,
    y,
    M,
    N,
    K,
    stride_y,
    stride_residual,
    stride_gate,
    rows_per_gate,
    RAW: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """``y[m, n] = sx[m] * scale[n] * sum_k x[m, k] * w[n, k] + bias[n]``, and ``residual`` added to it times ``gate``;
    absent parts None; ``x`` and ``w`` are descriptors of int8 blocks.
    """
    left = gl.allocate_shared_memory(gl.int8, [STAGES, x.block_shape[0], x.block_shape[1]], x.layout)
    right = gl.allocate_shared_memory(gl.int8, [STAGES, w.block_shape[0], w.block_shape[1]], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for consumer in gl.static_range(2):
        mbarrier.init(turn.index(consumer), count=1)
    fence_async_shared()
    parts = (sx, scale, bias)
    added = (residual, stride_residual, gate, stride_gate, rows_per_gate)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, left, right, full, empty, turn, parts, added, y, stride_y, M, N, K, RAW, STAGES, 1)),
                (_fetch, (x, w, left, right, full, empty, M, N, K, STAGES)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, left, right, full, empty, turn, parts, added, y, stride_y, M, N, K, RAW, STAGES, 2)),
                (_multiply, (1, left, right, full, empty, turn, parts, added, y, stride_y, M, N, K, RAW, STAGES, 2)),
                (_fetch, (x, w, left, right, full, empty, M, N, K, STAGES)),
            ],
            [WARPGROUP_WARPS, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


@functools.cache
def specialise(config: Config, out_dtype: torch.dtype) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`overlapped_product_kernel`."""
    constants = dict(
        RAW=out_dtype == torch.int32, STAGES=config.num_stages, CONSUMERS=CONSUMER_WARPS // config.num_warps
    )
    # Each operation of the epilogue rounds once, as in the reference: no fused multiply-add.
    return constants, dict(num_warps=config.num_warps, enable_fp_fusion=False)


def layout() -> gl.NVMMASharedLayout:
    """How the tiles of both operands lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE_BYTES, element_bitwidth=8, rank=2)


def _tiles_of(operand: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), [rows, columns], layout())


def overlapped_product(
    x: torch.Tensor,
    w: torch.Tensor,
    sx: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: Config,
    multiprocessors: int,
    added: GatedResidual | None = None,
) -> None:
    """:func:`.dense_product.dense_product` of int8 operands that descriptors can read."""
    rows, in_features = x.shape
    out_features = w.shape[0]
    constants, options = specialise(config, y.dtype)
    launch(
        overlapped_product_kernel,
        (min(cdiv(rows, config.block_m) * cdiv(out_features, config.block_n), multiprocessors),),
        (
            _tiles_of(x, config.block_m, config.block_k),
            _tiles_of(w, config.block_n, config.block_k),
            sx,
            scale,
            bias,
            None if added is None else added.residual,
            None if added is None else added.gate,
            y,
            rows,
            out_features,
            in_features,
            y.stride(0),
            0 if added is None else added.residual.stride(0),
            0 if added is None else added.gate.stride(0),
            1 if added is None else added.rows_per_gate,
        ),
        constants,
        options,
    )
