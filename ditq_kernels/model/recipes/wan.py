"""diffusers' ``WanTransformer3DModel``: Wan 2.1 and 2.2 (Team Wan, arXiv 2503.20314)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"blocks\.\d+"

WAN = Recipe(
    "WanTransformer3DModel",
    (
        Rule(
            r"condition_embedder\.time_embedder\.linear_1",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(
            r"condition_embedder\.time_embedder\.linear_2",
            "weight_only",
            "timestep embedder, of 26 million weights in the 14B models: one row per sample but for Wan 2.2 5B",
        ),
        Rule(
            r"condition_embedder\.time_proj",
            "weight_only",
            "modulation of all blocks: one row per sample, but for Wan 2.2 5B, where each token has a timestep",
        ),
        Rule(
            r"condition_embedder\.text_embedder\.linear_[12]",
            "weight_only",
            "text embedder, of 47 million weights in the 14B models: run once for all blocks; int8 would buy little",
        ),
        Rule(
            r"condition_embedder\.image_embedder\.ff\.net\.(0\.proj|2)",
            "keep",
            "embedder of the first picture: few weights, run once for all blocks",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "self-attention product"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0)", "scheme", "cross-attention product over video tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(_BLOCK + r"\.attn2\.add_[kv]_proj", "scheme", "cross-attention product over the first picture's tokens"),
        Rule(_BLOCK + r"\.ffn\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
    ),
    # The modulation is a block's table plus the output of one linear layer that all blocks share: dividing it for one
    # block would divide it for all. Only the cross-attention's queries are behind a norm with learnt weights.
    (
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("attn2.to_q",), ("norm2",)),
        # Attention to the text and, where there is a first picture, attention to it are added.
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v", "attn2.add_v_proj")),
    ),
)
