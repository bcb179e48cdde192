"""diffusers' ``MochiTransformer3DModel``: Mochi 1 (Genmo)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"
_VIDEO_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_TEXT_QKV = ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")

MOCHI = Recipe(
    "MochiTransformer3DModel",
    (
        Rule(
            r"time_embed\.timestep_embedder\.linear_[12]",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(
            r"time_embed\.pooler\.(to_q|to_kv|to_out)",
            "weight_only",
            "attention pooling of the text, of 63 million weights: run once, and an error here reaches every token",
        ),
        Rule(r"time_embed\.caption_proj", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.(norm1|norm1_context)\.linear|" + _BLOCK + r"\.norm1_context\.linear_1|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over video tokens"),
        Rule(_BLOCK + r"\.attn1\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_BLOCK + r"\.ff(_context)?\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the video"),
    ),
    # The modulation's four parts: gain and gate of the attention, then of the MLP; nothing is shifted. The last block
    # has nothing left to do for the text: there, a gain alone.
    (
        Fold(_BLOCK, _VIDEO_QKV, ("norm1.linear",), chunks=4, shifts=(), gains=(0,)),
        Fold(_BLOCK, ("ff.net.0.proj",), ("norm1.linear",), chunks=4, shifts=(), gains=(2,)),
        Fold(_BLOCK, _TEXT_QKV, ("norm1_context.linear",), chunks=4, shifts=(), gains=(0,)),
        Fold(_BLOCK, _TEXT_QKV, ("norm1_context.linear_1",), shifts=(), gains=(0,)),
        Fold(_BLOCK, ("ff_context.net.0.proj",), ("norm1_context.linear",), chunks=4, shifts=(), gains=(2,)),
        # Each token attends to both streams, so that both outputs are made of the values of both.
        Fold(_BLOCK, ("attn1.to_out.0", "attn1.to_add_out"), ("attn1.to_v", "attn1.add_v_proj")),
        # A gated MLP: first half * SiLU(second half).
        Fold(_BLOCK, ("ff.net.2",), ("ff.net.0.proj",), chunks=2),
        Fold(_BLOCK, ("ff_context.net.2",), ("ff_context.net.0.proj",), chunks=2),
    ),
)
