"""The blocks of Stable Diffusion 3 and 3.5: diffusers' ``JointTransformerBlock``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..shared_projections import joined_at
from .block import FusedBlock
from .joint_attention import joint_attention, runs_as_written
from .passes import (
    FEED_FORWARD,
    added,
    attended,
    feed_forward,
    fits,
    has_feed_forward,
    has_norm,
    modulation,
    normed,
    projected,
)


def _is_known(block: nn.Module) -> bool:
    runs_as_written(block.attn)  # asked now, it need not be when it is compiled
    norms = [block.norm1.norm, block.norm1_context.norm, block.norm2]
    mlps = [block.ff]
    if not block.context_pre_only:
        norms.append(block.norm2_context)
        mlps.append(block.ff_context)
    return all(map(has_norm, norms)) and all(map(has_feed_forward, mlps))


def _forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    if (
        joint_attention_kwargs
        or block._chunk_size is not None
        or temb.dtype != hidden_states.dtype
        or not (fits(temb, hidden_states) and fits(temb, encoder_hidden_states))
    ):
        return None
    x, text = hidden_states, encoder_hidden_states
    parts = modulation(block.norm1, temb, 9 if block.use_dual_attention else 6)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *of_second = parts
    if block.context_pre_only:  # the last block: nothing is left to do for the text
        text_scale, text_shift = modulation(block.norm1_context, temb, 2)
    else:
        text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = modulation(
            block.norm1_context, temb, 6
        )
    outputs = {"to_out": (x, gate)}
    if not block.context_pre_only:
        outputs["to_add_out"] = text, text_gate
    second = None
    if of_second:
        second_shift, second_scale, second_gate = of_second
        entering = normed(block.norm1.norm, x, joined_at(block.attn2, "to_q"), second_shift, second_scale)
        second = block.attn2(hidden_states=entering)
    entering = normed(block.norm1.norm, x, joined_at(block.attn, "to_q"), shift, scale)
    text_entering = normed(block.norm1_context.norm, text, joined_at(block.attn, "add_q_proj"), text_shift, text_scale)
    found = joint_attention(block.attn, entering, text_entering)
    if found is None:
        inputs = dict(hidden_states=entering, encoder_hidden_states=text_entering)
        x, *rest = attended(block.attn, outputs, **inputs)
    else:
        parts = zip(outputs, found, strict=False)  # of the last block's text nothing is asked
        x, *rest = (projected(block.attn, name, y, *outputs[name]) for name, y in parts)
    if second is not None:
        x = added(x, second_gate, second)
    entering = normed(block.norm2, x, block.ff.net[0].proj, shift_mlp, scale_mlp)
    x = feed_forward(block.ff, entering, x, gate_mlp)
    if block.context_pre_only:
        return None, x
    (text,) = rest
    entering = normed(block.norm2_context, text, block.ff_context.net[0].proj, text_shift_mlp, text_scale_mlp)
    return feed_forward(block.ff_context, entering, text, text_gate_mlp), x


SD3 = FusedBlock(
    "JointTransformerBlock",
    ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"),
    _is_known,
    (
        *("norm1", "norm1.norm", "norm1_context", "norm1_context.norm", "norm2", "norm2_context"),
        *(f"{name}{part}" for name in ("ff", "ff_context") for part in FEED_FORWARD),
    ),
    _forward,
)
