"""diffusers' ``Flux2Transformer2DModel``: FLUX.2 (Black Forest Labs)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_DOUBLE = r"transformer_blocks\.\d+"
_SINGLE = r"single_transformer_blocks\.\d+"
_FUSED = "attn.to_qkv_mlp_proj"

FLUX2 = Recipe(
    "Flux2Transformer2DModel",
    (
        Rule(
            r"time_guidance_embed\.(timestep|guidance)_embedder\.linear_1",
            "keep",
            "embedder of timestep or guidance: few weights, and an error here reaches every token",
        ),
        Rule(
            r"time_guidance_embed\.(timestep|guidance)_embedder\.linear_2",
            "weight_only",
            "embedder of timestep or guidance, of 38 million weights: one row per sample, bound by reading weights",
        ),
        Rule(
            r"(double_stream_modulation_(img|txt)|single_stream_modulation|norm_out)\.linear",
            "weight_only",
            "modulation, shared by all blocks of a kind: one row per sample, bound by reading weights",
        ),
        Rule(r"x_embedder", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(
            r"context_embedder",
            "weight_only",
            "text embedder of 94 million weights: run once for all blocks; int8 activations would buy little",
        ),
        Rule(_DOUBLE + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over image tokens"),
        Rule(_DOUBLE + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_DOUBLE + r"\.ff(_context)?\.linear_(in|out)", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.attn\.to_qkv_mlp_proj", "scheme", "input product of attention and MLP in one"),
        Rule(_SINGLE + r"\.attn\.to_out", "scheme", "output product of attention and MLP in one"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation is shared by all blocks of a kind: dividing it for one block would divide it for all.
    (
        # Each token attends to both streams, so that both outputs are made of the values of both.
        Fold(_DOUBLE, ("attn.to_out.0", "attn.to_add_out"), ("attn.to_v", "attn.add_v_proj")),
        # A gated MLP: SiLU(first half) * second half.
        Fold(_DOUBLE, ("ff.linear_out",), ("ff.linear_in",), chunks=2, shifts=(1,)),
        Fold(_DOUBLE, ("ff_context.linear_out",), ("ff_context.linear_in",), chunks=2, shifts=(1,)),
        # The fused product makes q, k, v and, each three times as wide, the two halves of a gated MLP. The output
        # product is fed the attention, then the MLP.
        Fold(_SINGLE, ("attn.to_out",), (_FUSED,), chunks=9, shifts=(2,), inputs=(0, 4)),
        *(
            Fold(_SINGLE, ("attn.to_out",), (_FUSED,), chunks=9, shifts=(5 + part,), inputs=(part, 4))
            for part in (1, 2, 3)
        ),
    ),
)
