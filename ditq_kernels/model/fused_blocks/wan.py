"""Wan's blocks: diffusers' ``WanTransformerBlock``, whose norms and gates compute in fp32."""

from __future__ import annotations

import torch
from torch import nn

from ..shared_projections import hands_on, joined_at
from .block import FusedBlock
from .passes import FEED_FORWARD, added, feed_forward, fits, has_feed_forward, has_norm, normed


def _is_known(block: nn.Module) -> bool:
    return has_norm(block.norm1) and has_norm(block.norm3) and has_feed_forward(block.ffn)


def _forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: torch.Tensor,
) -> torch.Tensor | None:
    if temb.ndim != 3 or not fits(temb, hidden_states):  # a modulation for each token
        return None
    x = hidden_states
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + temb.float()).unbind(1)
    entering = normed(block.norm1, x, joined_at(block.attn1, "to_q"), shift, scale)
    x = added(x, gate, block.attn1(entering, None, None, rotary_emb))
    query = block.attn2.to_q if hands_on(block.attn2) else None
    entering = normed(block.norm2, x, query) if has_norm(block.norm2) else x
    x = x + block.attn2(entering, encoder_hidden_states, None, None)
    entering = normed(block.norm3, x, block.ffn.net[0].proj, shift_mlp, scale_mlp)
    return feed_forward(block.ffn, entering, x, gate_mlp)


WAN = FusedBlock(
    "WanTransformerBlock",
    ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
    _is_known,
    ("norm1", "norm2", "norm3", *(f"ffn{part}" for part in FEED_FORWARD)),
    _forward,
)
