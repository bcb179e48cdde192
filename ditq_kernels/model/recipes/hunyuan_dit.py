"""diffusers' ``HunyuanDiT2DModel``: Hunyuan-DiT (Li et al., arXiv 2405.08748)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"blocks\.\d+"

HUNYUAN_DIT = Recipe(
    "HunyuanDiT2DModel",
    (
        Rule(
            r"text_embedder\.linear_[12]",
            "weight_only",
            "text embedder of 25 million weights: run once for all blocks; int8 activations would buy little",
        ),
        Rule(
            r"time_extra_emb\.pooler\.[qkvc]_proj",
            "keep",
            "attention pooling of the text, which reads these weights and never calls the layers",
        ),
        Rule(
            r"time_extra_emb\.(timestep|extra)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep and picture: few weights, and an error here reaches every token",
        ),
        Rule(
            _BLOCK + r"\.norm1\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "self-attention product"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0)", "scheme", "cross-attention product over image tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(_BLOCK + r"\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(_BLOCK + r"\.skip_linear", "scheme", "long skip connection: a product over all tokens, behind a norm"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # Every product but the MLP's second is behind a norm with learnt weights; the first norm's shift comes from the
    # timestep.
    (
        Fold(_BLOCK, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("norm1.norm", "norm1.linear")),
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("attn2.to_q",), ("norm2",)),
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v",)),
        Fold(_BLOCK, ("ff.net.0.proj",), ("norm3",)),
        Fold(_BLOCK, ("skip_linear",), ("skip_norm",)),
    ),
)
