"""diffusers' ``PixArtTransformer2DModel``: PixArt-alpha (Chen et al., arXiv 2310.00426) and Sigma (2403.04692)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

PIXART = Recipe(
    "PixArtTransformer2DModel",
    (
        Rule(
            r"adaln_single\.emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep or picture size: few weights, and an error here reaches every token",
        ),
        Rule(
            r"adaln_single\.linear",
            "weight_only",
            "modulation of all blocks: one row per sample, bound by reading weights",
        ),
        Rule(r"caption_projection\.linear_[12]", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "self-attention product"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0)", "scheme", "cross-attention product over image tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(_BLOCK + r"\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation is a block's table plus the output of one linear layer that all blocks share: dividing it for one
    # block would divide it for all.
    (
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v",)),
    ),
)
