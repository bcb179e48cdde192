"""What attention is given, in one pass over what a joined product made: queries and keys normalised and rotated head by
head, and streams of tokens put one behind the other.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer.errors import UnsupportedError
from .device import describe, launch_device
from .early_start import launch_options, starts_early, wait_for_earlier_kernels
from .launch import launch

MOST_CHANNELS = 256  # of a head
HEADS_AT_ONCE = 8  # that a program of one warp holds, of queries or of keys


@triton.jit
def _halves(value, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """[rows, channels] as the even ones and the odd ones."""
    return tl.split(tl.reshape(value, [ROWS, CHANNELS // 2, 2]))


@triton.jit(do_not_specialize=["tokens"])
def attention_inputs_kernel(
    x,
    query_norm,
    key_norm,
    cos,
    sin,
    y,
    tokens,
    stride_batch,
    stride_token,
    stride_part,
    stride_y_batch,
    eps,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``y[0]`` and ``y[1]``: queries and keys of one stream of ``tokens``, each pair of channels turned by its angle;
    ``y[2]``, if ``VALUES``: its values. One program a token and BLOCK_HEADS heads.
    """
    if EARLY:
        wait_for_earlier_kernels()
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = (head < HEADS)[:, None]
    channel = tl.arange(0, CHANNELS)
    at = head[:, None] * CHANNELS + channel[None, :]
    x += batch * stride_batch + token * stride_token + at
    y += batch * stride_y_batch + token * (HEADS * CHANNELS) + at
    if cos is not None:
        cos_even, cos_odd = _halves(tl.load(cos + token * CHANNELS + channel)[None, :], 1, CHANNELS)
        sin_even, sin_odd = _halves(tl.load(sin + token * CHANNELS + channel)[None, :], 1, CHANNELS)
    dtype: tl.constexpr = y.dtype.element_ty
    for part in tl.static_range(2):
        norm = query_norm if part == 0 else key_norm
        value = tl.load(x + part * HEADS * CHANNELS, mask=inside, other=0).to(tl.float32)
        mean = tl.sum(value * value, 1, keep_dims=True) / CHANNELS
        value = value * tl.rsqrt(mean + eps)
        if norm is not None:
            value = value * tl.load(norm + channel).to(tl.float32)[None, :]
        if cos is not None:
            even, odd = _halves(value.to(dtype).to(tl.float32), BLOCK_HEADS, CHANNELS)  # rounded as between two passes
            turned = tl.join(even * cos_even + -odd * sin_even, odd * cos_odd + even * sin_odd)
            value = tl.reshape(turned, [BLOCK_HEADS, CHANNELS])
        tl.store(y + part * stride_part, value.to(dtype), mask=inside)
    if VALUES:
        tl.store(y + 2 * stride_part, tl.load(x + 2 * HEADS * CHANNELS, mask=inside, other=0), mask=inside)


@functools.cache
def specialise(
    heads: int, channels: int, values: bool, capability: int
) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """(compile-time constants, launch options)."""
    block = next(size for size in (HEADS_AT_ONCE, 4, 2, 1) if heads % size == 0 or size == 1)
    early = starts_early(capability)
    constants = dict(HEADS=heads, CHANNELS=channels, BLOCK_HEADS=block, VALUES=values, EARLY=early)
    return constants, dict(num_warps=1, enable_fp_fusion=False) | launch_options(early)


def attention_inputs(
    x: torch.Tensor,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    before: torch.Tensor | None = None,
    before_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.attention_inputs`.

    Raises:
        UnsupportedError: for heads whose channels are no power of two of 2 to MOST_CHANNELS.
    """
    channels = x.shape[2] // (3 * heads)
    if channels & (channels - 1) or not 2 <= channels <= MOST_CHANNELS:
        raise UnsupportedError(
            f"attention_inputs on the triton backend takes heads of 2, 4, 8 ... {MOST_CHANNELS} channels, got "
            f"{channels}; use the reference backend"
        )
    values = before is not None
    first = before.shape[1] if values else 0
    y = torch.empty((3 if values else 2, len(x), first + x.shape[1], heads, channels), dtype=x.dtype, device=x.device)
    constants, options = specialise(heads, channels, values, describe(x.device).capability)
    if not values:
        x = x[:, :, : 2 * heads * channels]
    with launch_device(x):
        for stream, of_stream, place in ((before, before_norms, slice(first)), (x, norms, slice(first, None))):
            if stream is None or not stream.numel():
                continue
            of_place = y[:, :, place]
            launch(
                attention_inputs_kernel,
                (len(stream) * stream.shape[1], heads // constants["BLOCK_HEADS"]),
                (
                    stream,
                    *of_stream,
                    None if cos is None else cos[place],
                    None if sin is None else sin[place],
                    of_place,
                    stream.shape[1],
                    stream.stride(0),
                    stream.stride(1),
                    y.stride(0),
                    y.stride(1),
                    eps,
                ),
                constants,
                options,
            )
    return y
