"""Qwen-Image's blocks: diffusers' ``QwenImageTransformerBlock``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..shared_projections import joined_at
from .block import FusedBlock
from .passes import FEED_FORWARD, attended, clipped, feed_forward, fits, has_feed_forward, has_norm, normed

_STREAMS = ("img", "txt")


def _is_known(block: nn.Module) -> bool:
    norms = (getattr(block, f"{stream}_norm{number}") for stream in _STREAMS for number in (1, 2))
    mlps = (getattr(block, f"{stream}_mlp") for stream in _STREAMS)
    return not block.zero_cond_t and all(map(has_norm, norms)) and all(map(has_feed_forward, mlps))


def _forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if (
        joint_attention_kwargs
        or modulate_index is not None
        or temb.dtype != hidden_states.dtype
        or not (fits(temb, hidden_states) and fits(temb, encoder_hidden_states))
    ):
        return None
    x, text = hidden_states, encoder_hidden_states
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = block.txt_mod(temb).chunk(
        6, dim=-1
    )
    x, text = attended(
        block.attn,
        {"to_out": (x, gate), "to_add_out": (text, text_gate)},
        hidden_states=normed(block.img_norm1, x, joined_at(block.attn, "to_q"), shift, scale),
        encoder_hidden_states=normed(
            block.txt_norm1, text, joined_at(block.attn, "add_q_proj"), text_shift, text_scale
        ),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
    )
    entering = normed(block.img_norm2, x, block.img_mlp.net[0].proj, shift_mlp, scale_mlp)
    x = feed_forward(block.img_mlp, entering, x, gate_mlp)
    entering = normed(block.txt_norm2, text, block.txt_mlp.net[0].proj, text_shift_mlp, text_scale_mlp)
    text = feed_forward(block.txt_mlp, entering, text, text_gate_mlp)
    return clipped(text), clipped(x)


QWEN_IMAGE = FusedBlock(
    "QwenImageTransformerBlock",
    (
        *("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb"),
        *("joint_attention_kwargs", "modulate_index"),
    ),
    _is_known,
    (
        *(f"{stream}_norm{number}" for stream in _STREAMS for number in (1, 2)),
        *(f"{stream}_mlp{part}" for stream in _STREAMS for part in FEED_FORWARD),
    ),
    _forward,
)
