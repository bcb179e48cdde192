"""Codes and stored bytes, in both directions: the executable specification of each layout.

``int8``            int8 ``[N, K]``, row-major.
``int4_planar128``  uint8 ``[N, ceil(K / 128) * 64]``, planar in blocks of 128 along K: byte ``j`` of a block holds code
                    ``j`` in its low and code ``j + 64`` in its high nibble, so that a kernel decodes two contiguous
                    half-blocks and multiplies each by a contiguous half of the activations. Codes past K are 0; they
                    meet activations that are masked to 0.
group bytes         uint8 ``[ceil(K / G), N]``: ``m - 1`` in the high, ``z`` in the low nibble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 128
HALF_BLOCK = BLOCK // 2


def _pack_int8(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.int8).contiguous()


def _unpack_int8(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    return stored


def _pack_int4_planar(codes: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    codes, missing = codes.to(torch.uint8).contiguous(), -columns % BLOCK
    # Padding by nothing would copy. Fresh memory of this size costs more than what is computed in it.
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    blocks = padded.reshape(rows, -1, 2, HALF_BLOCK)
    return (blocks[:, :, 1] << 4).bitwise_or_(blocks[:, :, 0]).view(rows, -1)


def _unpack_int4_planar(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    blocks = stored.view(stored.shape[0], -1, HALF_BLOCK)
    return torch.stack((blocks & 0xF, blocks >> 4), dim=2).reshape(stored.shape[0], -1)[:, :in_features]


@dataclass(frozen=True)
class Layout:
    """One way to store an [N, K] matrix of codes.

    Attributes:
        version: rises whenever the stored bytes change their meaning; checkpoints name it.
        dtype: of the stored tensor.
        columns: stored elements per row, as a function of K.
        pack: codes [N, K] to stored [N, columns(K)].
        unpack: (stored, K) to codes [N, K].
    """

    name: str
    version: int
    dtype: torch.dtype
    columns: Callable[[int], int]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int], torch.Tensor]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("int8", 1, torch.int8, lambda k: k, _pack_int8, _unpack_int8),
        Layout(
            "int4_planar128",
            1,
            torch.uint8,
            lambda k: -(-k // BLOCK) * HALF_BLOCK,
            _pack_int4_planar,
            _unpack_int4_planar,
        ),
    )
}


def pack_groups(multiplier: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Multipliers 1..16 and zero points 0..15, each uint8 [groups, N], to one uint8 [groups, N]."""
    return ((multiplier.to(torch.uint8) - 1) << 4) | zero_point.to(torch.uint8)


def unpack_groups(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`pack_groups`: (multiplier, zero point), each uint8 [groups, N]."""
    return (stored >> 4) + 1, stored & 0xF
