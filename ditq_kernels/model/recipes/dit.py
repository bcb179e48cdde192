"""diffusers' ``DiTTransformer2DModel``: DiT (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"

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
    # The modulation's six parts: shift, gain and gate of the attention, then of the MLP. The MLP's second product is
    # fed by GELU, through which nothing can be folded.
    (
        Fold(_BLOCK, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("norm1.linear",), chunks=6, shifts=(0,), gains=(1,)),
        Fold(_BLOCK, ("ff.net.0.proj",), ("norm1.linear",), chunks=6, shifts=(3,), gains=(4,)),
        Fold(_BLOCK, ("attn1.to_out.0",), ("attn1.to_v",)),
    ),
)
