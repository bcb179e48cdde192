"""diffusers' ``Lumina2Transformer2DModel``: Lumina-Image 2.0 (Qin et al., arXiv 2503.21758)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_MODULATED = r"(layers|noise_refiner)\.\d+"
_TEXT = r"context_refiner\.\d+"
_BLOCK = rf"({_MODULATED}|{_TEXT})"
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")

LUMINA2 = Recipe(
    "Lumina2Transformer2DModel",
    (
        Rule(r"x_embedder", "keep", "embedder of the latents: few weights, and every token passes through it"),
        Rule(
            r"time_caption_embed\.timestep_embedder\.linear_[12]",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(r"time_caption_embed\.caption_embedder\.1", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _MODULATED + r"\.norm1\.linear|norm_out\.linear_1",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "attention product"),
        Rule(_BLOCK + r"\.feed_forward\.linear_[123]", "scheme", "MLP product"),
        Rule(r"norm_out\.linear_2", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # Norms have learnt weights, modulated or not. Nothing is folded into the values: three heads of the attention share
    # a head of them, and the output product would need the same division for all three.
    (
        Fold(_MODULATED, _QKV, ("norm1.norm",)),
        Fold(_TEXT, _QKV, ("norm1",)),
        Fold(_BLOCK, ("feed_forward.linear_1", "feed_forward.linear_3"), ("ffn_norm1",)),
        # A gated MLP: linear_2(SiLU(linear_1) * linear_3).
        Fold(_BLOCK, ("feed_forward.linear_2",), ("feed_forward.linear_3",)),
    ),
)
