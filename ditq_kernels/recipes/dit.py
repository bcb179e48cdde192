"""diffusers' ``DiTTransformer2DModel``: DiT (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from .rule import Recipe, Rule

DIT = Recipe(
    "DiTTransformer2DModel",
    (
        Rule(
            r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_[12]",
            "keep",
            "timestep embedder: few weights, and an error here reaches every token",
        ),
        Rule(r"proj_out_2", "keep", "final layer: few weights, and its error goes straight into the picture"),
        Rule(
            r"transformer_blocks\.\d+\.norm1\.linear|proj_out_1",
            "weight_only",
            "modulation: one row per sample, bound by reading weights; int8 activations buy nothing",
        ),
        Rule(r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)", "scheme", "attention product"),
        Rule(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", "scheme", "MLP product"),
    ),
)
