"""diffusers' ``SanaTransformer2DModel``: Sana (Xie et al., arXiv 2410.10629), 1.5 and Sprint."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

# The MLPs are convolutions, which no scheme is for: almost half of the weights stay in 16 bits.
SANA = Recipe(
    "SanaTransformer2DModel",
    (
        Rule(
            r"time_embed\.(emb\.)?(timestep|guidance)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep or guidance: few weights, and an error here reaches every token",
        ),
        Rule(
            r"time_embed\.linear",
            "weight_only",
            "modulation of all blocks: one row per sample, bound by reading weights",
        ),
        Rule(r"caption_projection\.linear_[12]", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "product of the linear self-attention"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0)", "scheme", "cross-attention product over image tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation is a block's table plus the output of one linear layer that all blocks share: dividing it for one
    # block would divide it for all. Linear attention is as linear in its values as the other.
    (
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v",)),
    ),
)
