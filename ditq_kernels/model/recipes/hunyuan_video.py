"""diffusers' ``HunyuanVideoTransformer3DModel``: HunyuanVideo (Kong et al., arXiv 2412.03603)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_DOUBLE = r"transformer_blocks\.\d+"
_SINGLE = r"single_transformer_blocks\.\d+"
_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.\d+"
_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

HUNYUAN_VIDEO = Recipe(
    "HunyuanVideoTransformer3DModel",
    (
        Rule(
            r"(context_embedder\.)?time_text_embed\.(timestep|guidance|text)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep, guidance or pooled text: few weights, and an error here reaches every token",
        ),
        Rule(r"context_embedder\.proj_in", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(_REFINER + r"\.norm_out\.linear", "weight_only", "gates of the text refiner: one row per sample"),
        Rule(_REFINER + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "text refiner's attention product"),
        Rule(_REFINER + r"\.ff\.net\.(0\.proj|2)", "scheme", "text refiner's MLP product"),
        Rule(
            _DOUBLE + r"\.norm1(_context)?\.linear|" + _SINGLE + r"\.norm\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_DOUBLE + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over video tokens"),
        Rule(_DOUBLE + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_DOUBLE + r"\.ff(_context)?\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.attn\.to_[qkv]", "scheme", "attention product over video and text tokens"),
        Rule(_SINGLE + r"\.proj_mlp", "scheme", "MLP product"),
        Rule(_SINGLE + r"\.proj_out", "scheme", "output product of attention and MLP in one"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
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
        # The refiner's norms have learnt weights.
        Fold(_REFINER, _IMAGE_QKV, ("norm1",)),
        Fold(_REFINER, ("attn.to_out.0",), ("attn.to_v",)),
        Fold(_REFINER, ("ff.net.0.proj",), ("norm2",)),
    ),
)
