"""diffusers' ``SD3Transformer2DModel``: Stable Diffusion 3 (Esser et al., arXiv 2403.03206) and 3.5."""

from __future__ import annotations

from .rule import Fold, Recipe, Rule

_BLOCK = r"transformer_blocks\.\d+"
_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

SD3 = Recipe(
    "SD3Transformer2DModel",
    (
        Rule(
            r"time_text_embed\.(timestep|text)_embedder\.linear_[12]",
            "keep",
            "embedder of timestep and pooled text: few weights, and an error here reaches every token",
        ),
        Rule(r"context_embedder", "keep", "text embedder: few weights, run once for all blocks"),
        Rule(
            _BLOCK + r"\.norm1(_context)?\.linear|norm_out\.linear",
            "weight_only",
            "modulation: one row per sample, bound by reading weights",
        ),
        Rule(_BLOCK + r"\.attn\.(to_[qkv]|to_out\.0)", "scheme", "joint attention product over image tokens"),
        Rule(_BLOCK + r"\.attn\.(add_[qkv]_proj|to_add_out)", "scheme", "joint attention product over text tokens"),
        Rule(_BLOCK + r"\.attn2\.(to_[qkv]|to_out\.0)", "scheme", "second attention, over image tokens alone"),
        Rule(_BLOCK + r"\.ff(_context)?\.net\.(0\.proj|2)", "scheme", "MLP product"),
        Rule(r"proj_out", "keep", "final layer: few weights, and its error goes straight into the picture"),
    ),
    # The modulation's six parts: shift, gain and gate of the attention, then of the MLP. With a second attention there
    # are nine, that one's last. The last block has nothing left to do for the text: there, gain and shift.
    (
        *(
            Fold(_BLOCK, consumers, ("norm1.linear",), chunks=parts, shifts=(shift,), gains=(shift + 1,))
            for parts in (6, 9)
            for consumers, shift in ((_IMAGE_QKV, 0), (("ff.net.0.proj",), 3))
        ),
        Fold(_BLOCK, ("attn2.to_q", "attn2.to_k", "attn2.to_v"), ("norm1.linear",), chunks=9, shifts=(6,), gains=(7,)),
        Fold(_BLOCK, _TEXT_QKV, ("norm1_context.linear",), chunks=6, shifts=(0,), gains=(1,)),
        Fold(_BLOCK, _TEXT_QKV, ("norm1_context.linear",), chunks=2, shifts=(1,), gains=(0,)),
        Fold(_BLOCK, ("ff_context.net.0.proj",), ("norm1_context.linear",), chunks=6, shifts=(3,), gains=(4,)),
        # Each token attends to both streams, so that both outputs are made of the values of both, and of an image
        # adapter's where there is one.
        Fold(
            _BLOCK,
            ("attn.to_out.0", "attn.to_add_out"),
            ("attn.to_v", "attn.add_v_proj", "attn.processor.to_v_ip"),
        ),
        Fold(_BLOCK, ("attn2.to_out.0",), ("attn2.to_v", "attn2.processor.to_v_ip")),
    ),
)
