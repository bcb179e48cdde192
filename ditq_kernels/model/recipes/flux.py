"""diffusers' ``FluxTransformer2DModel``: FLUX.1 dev, schnell, Fill, Canny, Depth, Kontext (Black Forest Labs)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_DOUBLE = r"transformer_blocks\.\d+"
_SINGLE = r"single_transformer_blocks\.\d+"
_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX = Recipe(
    "FluxTransformer2DModel",
    (
        Rule(
            r"time_text_embed\.(timestep|guidance|text)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep, guidance or pooled text: few weights, and an error here reaches every token",
        ),
        Rule(r"x_embedder", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(r"context_embedder", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _DOUBLE + r"\.norm1(_context)?\.linear|" + _SINGLE + r"\.norm\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_DOUBLE + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over image tokens"),
        Rule(_DOUBLE + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_DOUBLE + r"\.ff(_context)?\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.attn\.to_[qkv]", "scheme", "attention product over image and text tokens"),
        Rule(_SINGLE + r"\.proj_mlp", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.proj_out", "scheme", "output product of attention and MLP in one"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation's parts: shift, gain and gate of the attention, then of the MLP.
    (
        Fold(_DOUBLE, _IMAGE_QKV, ("norm1.linear",), chunks=6, shifts=(0,), gains=(1,)),
        Fold(_DOUBLE, ("ff.net.0.proj",), ("norm1.linear",), chunks=6, shifts=(3,), gains=(4,)),
        Fold(_DOUBLE, _TEXT_QKV, ("norm1_context.linear",), chunks=6, shifts=(0,), gains=(1,)),
        Fold(_DOUBLE, ("ff_context.net.0.proj",), ("norm1_context.linear",), chunks=6, shifts=(3,), gains=(4,)),
        # Each token attends to both streams, so that both outputs are made of the values of both.
        Fold(_DOUBLE, ("attn.to_out.0", "attn.to_add_out"), ("attn.to_v", "attn.add_v_proj")),
        Fold(_SINGLE, (*_IMAGE_QKV, "proj_mlp"), ("norm.linear",), chunks=3, shifts=(0,), gains=(1,)),
        # proj_out is fed the attention, then the MLP, which is four times as wide and comes out of GELU.
        Fold(_SINGLE, ("proj_out",), ("attn.to_v",), inputs=(0, 5)),
    ),
)
