"""diffusers' ``AuraFlowTransformer2DModel``: AuraFlow (fal)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_JOINT = r"joint_transformer_blocks\.\d+"
_BLOCK = r"(joint|single)_transformer_blocks\.\d+"

AURAFLOW = Recipe(
    "AuraFlowTransformer2DModel",
    (
        Rule(r"pos_embed\.proj", "keep", "patch embedder: few weights, and every token passes through it"),
        Rule(
            r"time_step_proj\.linear_[12]",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(r"context_embedder", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.norm1\.linear|" + _JOINT + r"\.norm1_context\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "attention product"),
        Rule(_JOINT + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_BLOCK + r"\.ff\.(linear_[12]|out_projection)", "scheme", "MLP product"),
        Rule(_JOINT + r"\.ff_context\.(linear_[12]|out_projection)", "scheme", "MLP product over text tokens"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # No linear layer here has a bias, and 1 + gain cannot be divided without one: nothing is folded into modulations.
    (
        # In a joint block each token attends to both streams; a single block has to_v and to_out.0 only.
        Fold(_BLOCK, ("attn.to_out.0", "attn.to_add_out"), ("attn.to_v", "attn.add_v_proj")),
        # A gated MLP: out_projection(SiLU(linear_1) * linear_2).
        Fold(_BLOCK, ("ff.out_projection",), ("ff.linear_2",)),
        Fold(_JOINT, ("ff_context.out_projection",), ("ff_context.linear_2",)),
    ),
    behind_activation=r".+\.out_projection",
)
