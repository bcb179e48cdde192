"""diffusers' ``ChromaTransformer2DModel``: Chroma (lodestones), FLUX.1-schnell with its modulations distilled into one
small network.
"""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_DOUBLE = r"transformer_blocks\.\d+"
_SINGLE = r"single_transformer_blocks\.\d+"

CHROMA = Recipe(
    "ChromaTransformer2DModel",
    (
        Rule(
            r"distilled_guidance_layer\.in_proj",
            "keep",
            "embedder of timestep, guidance and place: few weights, and an error here reaches every modulation",
        ),
        Rule(
            r"distilled_guidance_layer\.(layers\.\d+\.linear_[12]|out_proj)",
            "weight_only",
            "makes the modulations of all blocks: 344 rows per sample, and an error here reaches every token",
        ),
        Rule(r"x_embedder", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(r"context_embedder", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(_DOUBLE + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over image tokens"),
        Rule(_DOUBLE + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_DOUBLE + r"\.ff(_context)?\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.attn\.to_[qkv]", "scheme", "attention product over image and text tokens"),
        Rule(_SINGLE + r"\.proj_mlp", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.proj_out", "scheme", "output product of attention and MLP in one"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # One layer makes the modulations of all blocks, row by row: dividing it for one block would divide it for all.
    (
        # Each token attends to both streams, so that both outputs are made of the values of both.
        Fold(_DOUBLE, ("attn.to_out.0", "attn.to_add_out"), ("attn.to_v", "attn.add_v_proj")),
        # proj_out is fed the attention, then the MLP, which is four times as wide and comes out of GELU.
        Fold(_SINGLE, ("proj_out",), ("attn.to_v",), inputs=(0, 5)),
    ),
)
