"""FLUX's blocks: diffusers' ``FluxTransformerBlock`` of two streams, and ``FluxSingleTransformerBlock`` of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..shared_projections import joined_at
from .block import FusedBlock
from .joint_attention import joint_attention, runs_as_written
from .passes import (
    FEED_FORWARD,
    after_gelu,
    attended,
    clipped,
    feed_forward,
    fits,
    has_feed_forward,
    has_norm,
    modulation,
    normed,
    projected,
    quantize_alike,
    takes_codes,
)

_PARAMETERS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs")


def _is_known_double(block: nn.Module) -> bool:
    runs_as_written(block.attn)  # asked now, it need not be when it is compiled
    norms = block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context
    return all(map(has_norm, norms)) and has_feed_forward(block.ff) and has_feed_forward(block.ff_context)


def _double(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if joint_attention_kwargs or temb.dtype != hidden_states.dtype:
        return None
    x, text = hidden_states, encoder_hidden_states
    if not (fits(temb, x) and fits(temb, text)):
        return None
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(block.norm1, temb, 6)
    text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = modulation(
        block.norm1_context, temb, 6
    )
    entering = normed(block.norm1.norm, x, joined_at(block.attn, "to_q"), shift, scale)
    text_entering = normed(block.norm1_context.norm, text, joined_at(block.attn, "add_q_proj"), text_shift, text_scale)
    outputs = {"to_out": (x, gate), "to_add_out": (text, text_gate)}
    found = joint_attention(block.attn, entering, text_entering, image_rotary_emb)
    if found is None:
        inputs = dict(encoder_hidden_states=text_entering, image_rotary_emb=image_rotary_emb)
        x, text = attended(block.attn, outputs, hidden_states=entering, **inputs)
    else:
        x, text = (projected(block.attn, name, y, *outputs[name]) for name, y in zip(outputs, found, strict=True))
    entering = normed(block.norm2, x, block.ff.net[0].proj, shift_mlp, scale_mlp)
    x = feed_forward(block.ff, entering, x, gate_mlp)
    entering = normed(block.norm2_context, text, block.ff_context.net[0].proj, text_shift_mlp, text_scale_mlp)
    return clipped(feed_forward(block.ff_context, entering, text, text_gate_mlp)), x


FLUX_DOUBLE = FusedBlock(
    "FluxTransformerBlock",
    _PARAMETERS,
    _is_known_double,
    (
        *("norm1", "norm1.norm", "norm1_context", "norm1_context.norm", "norm2", "norm2_context"),
        *(f"{name}{part}" for name in ("ff", "ff_context") for part in FEED_FORWARD),
    ),
    _double,
)


def _is_known_single(block: nn.Module) -> bool:
    runs_as_written(block.attn)
    layers = block.attn.to_q, block.proj_mlp  # which share an input, and have to agree on its codes
    return has_norm(block.norm.norm) and quantize_alike(layers) and isinstance(block.act_mlp, nn.GELU)


def _single(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if joint_attention_kwargs or temb.dtype != hidden_states.dtype or not fits(temb, hidden_states):
        return None
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation(block.norm, temb, 3)
    layer = joined_at(block.attn, "to_q") if takes_codes(block.proj_mlp) else None
    entering = normed(block.norm.norm, x, layer, shift, scale)
    hidden = block.proj_mlp(entering)
    found = joint_attention(block.attn, entering, rotary=image_rotary_emb)
    attention = block.attn(hidden_states=entering, image_rotary_emb=image_rotary_emb) if found is None else found[0]
    x = clipped(after_gelu(block.proj_out, block.act_mlp, hidden, x, gate, before=attention))
    texts = encoder_hidden_states.shape[1]
    return x[:, :texts], x[:, texts:]


FLUX_SINGLE = FusedBlock(
    "FluxSingleTransformerBlock", _PARAMETERS, _is_known_single, ("norm", "norm.norm", "act_mlp"), _single
)
