"""diffusers' ``CosmosTransformer3DModel``: Cosmos Predict 1, 2 and 2.5 (NVIDIA, arXiv 2501.03575)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

COSMOS = Recipe(
    "CosmosTransformer3DModel",
    (
        Rule(r"patch_embed\.proj", "keep", "patch embedder: few weights, and every token passes through it"),
        Rule(
            r"time_embed\.t_embedder\.linear_[12]",
            "weight_only",
            "timestep embedder and the blocks' shared part of the modulation: few rows, bound by reading weights",
        ),
        Rule(
            r"crossattn_proj\.0",
            "weight_only",
            "text embedder of 103 million weights: run once for all blocks; int8 activations would buy little",
        ),
        Rule(r"img_context_proj\.0", "keep", "embedder of a given picture: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.norm[123]\.linear_[12]|norm_out\.linear_[12]",
            "weight_only",
            "modulation: one row per sample, or per token where each frame has a timestep",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "self-attention product"),
        Rule(_BLOCK + r"\.attn2\.(to_q|to_out\.0|q_img)", "scheme", "cross-attention product over video tokens"),
        Rule(_BLOCK + r"\.attn2\.to_[kv]", "scheme", "cross-attention product over text tokens"),
        Rule(_BLOCK + r"\.attn2\.[kv]_img", "scheme", "cross-attention product over a given picture's tokens"),
        Rule(_BLOCK + r"\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
    ),
    # A part of the modulation comes from a layer that all blocks share, and the block's own has no bias: nothing is
    # folded into it.
    (
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
        # Attention to the text and, where there is a given picture, attention to it are added.
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v", "attn2.v_img")),
    ),
)
