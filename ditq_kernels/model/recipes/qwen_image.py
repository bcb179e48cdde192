"""diffusers' ``QwenImageTransformer2DModel``: Qwen-Image (Wu et al., arXiv 2508.02324) and its Edit models."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

QWEN_IMAGE = Recipe(
    "QwenImageTransformer2DModel",
    (
        Rule(
            r"time_text_embed\.timestep_embedder\.linear_[12]",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(r"img_in", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(r"txt_in", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.(img|txt)_mod\.1|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over image tokens"),
        Rule(_BLOCK + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_BLOCK + r"\.(img|txt)_mlp\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation's six parts: shift, gain and gate of the attention, then of the MLP.
    (
        Fold(_BLOCK, ("attn.to_q", "attn.to_k", "attn.to_v"), ("img_mod.1",), chunks=6, shifts=(0,), gains=(1,)),
        Fold(_BLOCK, ("img_mlp.net.0.proj",), ("img_mod.1",), chunks=6, shifts=(3,), gains=(4,)),
        Fold(
            _BLOCK,
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ("txt_mod.1",),
            chunks=6,
            shifts=(0,),
            gains=(1,),
        ),
        Fold(_BLOCK, ("txt_mlp.net.0.proj",), ("txt_mod.1",), chunks=6, shifts=(3,), gains=(4,)),
        # Each token attends to both streams, so that both outputs are made of the values of both.
        Fold(_BLOCK, ("attn.to_out.0", "attn.to_add_out"), ("attn.to_v", "attn.add_v_proj")),
    ),
)
