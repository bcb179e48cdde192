"""The blocks of DiT and PixArt: diffusers' ``BasicTransformerBlock`` with adaptive norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..shared_projections import joined_at
from .block import FusedBlock
from .passes import FEED_FORWARD, attended, feed_forward, fits, has_feed_forward, has_norm, modulation, normed


def _is_known(block: nn.Module) -> bool:
    if block.norm_type == "ada_norm_zero":
        known = block.attn2 is None and has_norm(block.norm1.norm) and has_norm(block.norm3)
    else:
        known = block.norm_type == "ada_norm_single" and has_norm(block.norm1) and has_norm(block.norm2)
    return known and block.pos_embed is None and not block.only_cross_attention and has_feed_forward(block.ff)


def _forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor | None:
    x = hidden_states.contiguous()  # patches come transposed, and what is added to them would be, in all blocks
    if x.ndim != 3 or cross_attention_kwargs or block._chunk_size is not None:
        return None
    if block.norm_type == "ada_norm_zero":
        parts = modulation(block.norm1, block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype), 6)
        first, second = block.norm1.norm, block.norm3
    else:
        if timestep.dtype != x.dtype:
            return None
        parts = (block.scale_shift_table + timestep.reshape(len(x), 6, -1)).unbind(1)
        first, second = block.norm1, block.norm2
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    if not fits(shift, x):
        return None
    entering = normed(first, x, joined_at(block.attn1, "to_q"), shift, scale)
    (x,) = attended(block.attn1, {"to_out": (x, gate)}, hidden_states=entering, attention_mask=attention_mask)
    if block.attn2 is not None:
        x = x + block.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    entering = normed(second, x, block.ff.net[0].proj, shift_mlp, scale_mlp)
    return feed_forward(block.ff, entering, x, gate_mlp)


BASIC = FusedBlock(
    "BasicTransformerBlock",
    (
        *("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep"),
        *("cross_attention_kwargs", "class_labels", "added_cond_kwargs"),
    ),
    _is_known,
    ("norm1", "norm1.norm", "norm2", "norm3", *(f"ff{part}" for part in FEED_FORWARD)),
    _forward,
)
