"""diffusers' ``LTXVideoTransformer3DModel``: LTX-Video (HaCohen et al., arXiv 2501.00103)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

LTX = Recipe(
    "LTXVideoTransformer3DModel",
    (
        Rule(r"proj_in", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(
            r"time_embed\.emb\.timestep_embedder\.linear_1",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(
            r"time_embed\.emb\.timestep_embedder\.linear_2",
            "weight_only",
            "timestep embedder, of 17 million weights in the 13B model: one row per sample or token",
        ),
        Rule(
            r"time_embed\.linear",
            "weight_only",
            "modulation of all blocks: one row per sample, or per token where a picture is given",
        ),
        Rule(
            r"caption_projection\.linear_[12]",
            "weight_only",
            "text embedder, of 34 million weights in the 13B model: run once for all blocks; int8 would buy little",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "self-attention product"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0)", "scheme", "cross-attention product over video tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(_BLOCK + r"\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
    ),
    # The modulation is a block's table plus the output of one linear layer that all blocks share: dividing it for one
    # block would divide it for all.
    (
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v",)),
    ),
)
