"""Configurations of published diffusers transformers: what their config.json says, where it differs from the defaults
of the class. Shared by the tests of recipes and by the table of sizes in docs/models.md, which this file writes when it
is run.
"""

import functools
import math
from pathlib import Path

import torch

from ditq_kernels.model.planning import Plan, plan

_DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8}
_SIGMA = {"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2}
_SD3 = {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 24, "pos_embed_max_size": 192}
_KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_HUNYUAN_DIT = {
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 40,
    "hidden_size": 1408,
    "mlp_ratio": 4.3637,
    "sample_size": 128,
    "use_style_cond_and_image_meta_size": False,
}
_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_COGVIDEOX_15 = {"patch_size_t": 2, "patch_bias": False}
_WAN_13B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_COSMOS_2 = {"num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
_COSMOS_25 = {
    "in_channels": 17,
    "num_attention_heads": 16,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}

# Name: (class in diffusers, arguments).
MODELS = {
    "DiT-XL/2 256": ("DiTTransformer2DModel", {**_DIT_XL, "sample_size": 32}),
    "PixArt-alpha XL 1024": ("PixArtTransformer2DModel", {"caption_channels": 4096, "interpolation_scale": 2}),
    "PixArt-Sigma XL 1024": ("PixArtTransformer2DModel", _SIGMA),
    "SD3 medium": ("SD3Transformer2DModel", _SD3),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "SD3.5 large": (
        "SD3Transformer2DModel",
        {
            "caption_projection_dim": 2432,
            "num_attention_heads": 38,
            "num_layers": 38,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "FLUX.1-schnell": ("FluxTransformer2DModel", {}),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.1 Canny, Depth": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "in_channels": 128, "out_channels": 64},
    ),
    "FLUX.1-Fill": ("FluxTransformer2DModel", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2-klein 4B": ("Flux2Transformer2DModel", _KLEIN_4B),
    "Sana 1600M": ("SanaTransformer2DModel", {}),
    "Sana 1.5 4.8B": ("SanaTransformer2DModel", {"num_layers": 60, "qk_norm": "rms_norm_across_heads"}),
    "Hunyuan-DiT 1.2": ("HunyuanDiT2DModel", _HUNYUAN_DIT),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "CogVideoX 2B": ("CogVideoXTransformer3DModel", {}),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", _COGVIDEOX_5B),
    "CogVideoX 1.5 5B": ("CogVideoXTransformer3DModel", {**_COGVIDEOX_5B, **_COGVIDEOX_15}),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", _WAN_13B),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
    "Wan 2.1 14B image to video": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan 2.2 5B": ("WanTransformer3DModel", _WAN_5B),
    "Wan 2.2 14B image to video, each of two": ("WanTransformer3DModel", {"in_channels": 36}),
    "LTX-Video 0.9 2B": ("LTXVideoTransformer3DModel", {}),
    "LTX-Video 0.9.7 13B": (
        "LTXVideoTransformer3DModel",
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Lumina-Image 2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "Mochi 1": ("MochiTransformer3DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "Cosmos 1 7B": ("CosmosTransformer3DModel", {}),
    "Cosmos 1 14B": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 36, "rope_scale": (2.0, 2.0, 2.0)},
    ),
    "Cosmos 2 2B": ("CosmosTransformer3DModel", _COSMOS_2),
    "Cosmos 2.5 2B": ("CosmosTransformer3DModel", _COSMOS_25),
}


@functools.cache
def _built(name: str) -> torch.nn.Module:
    """A published model without its weights."""
    import diffusers

    architecture, arguments = MODELS[name]
    with torch.device("meta"):
        return getattr(diffusers, architecture)(**arguments)


@functools.cache
def planned(name: str, scheme: str = "w4a8_g128") -> Plan:
    """The plan for a published model."""
    return plan(_built(name), scheme)


def parameters(chosen: Plan) -> int:
    return chosen.other_parameters + sum(entry.weights for entry in chosen)


def gigabytes(chosen: Plan) -> float:
    """All parameters as the plan stores them, scales included; what it leaves alone takes 16 bits each."""
    return (sum(entry.stored_bits for entry in chosen) / 8 + 2 * chosen.other_parameters) / 1e9


PAGE = """# Sizes of published models

What the transformer alone takes, without text encoders and VAE, in 16 bits, in 8 (`w8a8`) and in 4 (`w4a8_g128`), in GB
of 10⁹ bytes: scales are counted, and so is what a [recipe](../ditq_kernels/model/recipes) leaves in 16 bits. Computed
from the models' configurations ([tests/published_models.py](../tests/published_models.py)), nothing measured; tables of
positions that a model keeps in buffers are not parameters.

| model | parameters, 10⁹ | quantized | 16 bits | 8 bits | 4 bits |
|---|---|---|---|---|---|
{rows}

Modulations and large embedders get weights in 8 or 4 bits and keep activations in 16. Sana's MLPs are convolutions,
which stay. DiT-XL/2 is larger here than in its paper: diffusers repeats the embedders of timestep and class in every
block.

`print(ditq.plan(model, scheme))` says of every layer what becomes of it and why.
"""


def page() -> str:
    """docs/models.md."""
    rows = []
    for name in MODELS:
        chosen = planned(name)
        every = parameters(chosen)
        share = math.floor(1000 * sum(entry.weights for entry in chosen.quantized()) / every) / 10  # no 100 for 99.99
        sizes = (2 * every / 1e9, gigabytes(planned(name, "w8a8")), gigabytes(chosen))
        rows.append(f"| {name} | {every / 1e9:.2f} | {share}% | {' | '.join(f'{size:.2f}' for size in sizes)} |")
    return PAGE.format(rows="\n".join(rows))


if __name__ == "__main__":
    (Path(__file__).parent.parent / "docs" / "models.md").write_text(page())
