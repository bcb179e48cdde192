"""diffusers' ``CogVideoXTransformer3DModel``: CogVideoX (Yang et al., arXiv 2408.06072) and 1.5."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

COGVIDEOX = Recipe(
    "CogVideoXTransformer3DModel",
    (
        Rule(
            r"(time|ofs)_embedding\.linear_[12]",
            "keep",
            "embedder of timestep or offset: few weights, and an error here reaches every token",
        ),
        Rule(r"patch_embed\.proj", "keep", "patch embedder: few weights, and every token passes through it"),
        Rule(r"patch_embed\.text_proj", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.norm[12]\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "attention product over text and video tokens"),
        Rule(_BLOCK + r"\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
    ),
    # The modulation's six parts: shift, gain and gate of the video tokens, then of the text tokens, which go through
    # the same products.
    (
        Fold(
            _BLOCK,
            ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            ("norm1.linear",),
            chunks=6,
            shifts=(0, 3),
            gains=(1, 4),
        ),
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        Fold(_BLOCK, ("ff.net.0.proj",), ("norm2.linear",), chunks=6, shifts=(0, 3), gains=(1, 4)),
    ),
)
