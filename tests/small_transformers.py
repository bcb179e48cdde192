"""Every architecture that has a recipe, small enough for a CPU: arguments of the class, and what its model is called
with. Where variants differ in what their blocks hold, each is there.
"""

import pytest
import torch

_GENERATED = torch.Generator()


def _random(*shape):
    return torch.randn(*shape, generator=_GENERATED)


def _time(batch=2):
    return torch.linspace(100, 800, batch)


def _image(channels=4, size=8):
    return _random(2, channels, size, size)


def _video(channels=4, frames=2, size=8):
    return _random(2, channels, frames, size, size)


def _text(width, tokens=5, batch=2):
    return _random(batch, tokens, width)


def _packed(width, channels=4):
    """What the models of the FLUX family are called with: tokens, and their positions along some axes."""
    axes = 4 if width == "flux2" else 3
    image, text = torch.zeros(16, axes), torch.zeros(5, axes)
    image[:, 1], image[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": _random(2, 16, channels),
        "encoder_hidden_states": _text(24),
        "timestep": torch.tensor([0.2, 0.7]),
        "img_ids": image,
        "txt_ids": text,
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
    **_HEADS,
}
_FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    **_HEADS,
}
_COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 8,
    "max_size": (4, 16, 16),
    "concat_padding_mask": False,
    **_HEADS,
}
_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    **_HEADS,
}
_WAN = {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 16,
    **_HEADS,
}


def _dit():
    return {
        "hidden_states": _image(),
        "timestep": torch.tensor([100, 800]),
        "class_labels": torch.tensor([0, 2]),
    }


def _pixart():
    return {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(24),
        "timestep": _time(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3():
    return {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(24),
        "pooled_projections": _random(2, 24),
        "timestep": _time(),
    }


def _flux():
    return {**_packed("flux"), "pooled_projections": _random(2, 24), "guidance": torch.tensor([3.0, 4.0])}


def _flux2():
    return {**_packed("flux2"), "guidance": torch.tensor([3.0, 4.0])}


def _chroma():
    return _packed("flux")


def _sana():
    return {"hidden_states": _image(), "encoder_hidden_states": _text(24), "timestep": _time()}


def _hunyuan_dit():
    return {
        "hidden_states": _image(),
        "timestep": _time(),
        "encoder_hidden_states": _text(24),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": _text(16, tokens=4),
        "text_embedding_mask_t5": torch.ones(2, 4),
    }


def _hunyuan_video():
    return {
        "hidden_states": _video(),
        "timestep": _time(),
        "encoder_hidden_states": _text(24),
        "encoder_attention_mask": torch.ones(2, 5),
        "pooled_projections": _random(2, 16),
        "guidance": torch.tensor([3000.0, 4000.0]),
    }


def _cogvideox():
    return {
        "hidden_states": _random(2, 2, 4, 8, 8),
        "encoder_hidden_states": _text(24),
        "timestep": torch.tensor([100, 800]),
    }


def _wan():
    return {"hidden_states": _video(), "timestep": _time(), "encoder_hidden_states": _text(24)}


def _wan_time_of_each_token():
    return {**_wan(), "timestep": _random(2, 32).abs() * 500}


def _wan_picture():
    return {
        **_wan(),
        "encoder_hidden_states": _text(24, tokens=512),
        "encoder_hidden_states_image": _text(24, tokens=6),
    }


def _ltx():
    return {
        "hidden_states": _random(2, 2 * 4 * 4, 4),
        "encoder_hidden_states": _text(24),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _qwen_image():
    return {
        "hidden_states": _random(2, 16, 4),
        "encoder_hidden_states": _text(24),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.2, 0.7]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def _lumina2():
    return {
        "hidden_states": _image(),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": _text(24),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }


def _auraflow():
    return {"hidden_states": _image(), "encoder_hidden_states": _text(24), "timestep": torch.tensor([0.2, 0.7])}


def _mochi():
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return {
        "hidden_states": _video(),
        "encoder_hidden_states": _text(24),
        "timestep": _time(),
        "encoder_attention_mask": mask,
    }


def _cosmos():
    return {"hidden_states": _video(), "timestep": _time(), "encoder_hidden_states": _text(24)}


def _cosmos_picture():
    return {
        **_cosmos(),
        "encoder_hidden_states": (_text(20), _text(12, tokens=6)),
        "attention_mask": None,
    }


# Name: (class in diffusers, arguments, what it is called with).
SMALL = {
    "DiT": (
        "DiTTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 3, **_HEADS},
        _dit,
    ),
    "PixArt": (
        "PixArtTransformer2DModel",
        {"num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 24, **_HEADS},
        _pixart,
    ),
    "SD3": ("SD3Transformer2DModel", _SD3, _sd3),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        _sd3,
    ),
    "FLUX": (
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 24, "guidance_embeds": True},
        _flux,
    ),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        {**_FLUX, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        _flux2,
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
            **_HEADS,
        },
        _sana,
    ),
    "Hunyuan-DiT": (
        "HunyuanDiT2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 24,
            "text_len": 5,
            "text_len_t5": 4,
            "use_style_cond_and_image_meta_size": False,
            **_HEADS,
        },
        _hunyuan_dit,
    ),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video),
    "HunyuanVideo image to video": (
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        _hunyuan_video,
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 12,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 5,
            **_HEADS,
        },
        _cogvideox,
    ),
    "Wan": ("WanTransformer3DModel", _WAN, _wan),
    "Wan 2.2 5B": ("WanTransformer3DModel", _WAN, _wan_time_of_each_token),
    "Wan image to video": ("WanTransformer3DModel", {**_WAN, "image_dim": 24, "added_kv_proj_dim": 32}, _wan_picture),
    "LTX-Video": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 24,
            **_HEADS,
        },
        _ltx,
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            **_HEADS,
        },
        _qwen_image,
    ),
    "Qwen-Image-Edit 2511": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "zero_cond_t": True,
            **_HEADS,
        },
        _qwen_image,
    ),
    "Lumina-Image 2.0": (
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 24,
        },
        _lumina2,
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 64,
            **_HEADS,
        },
        _auraflow,
    ),
    "Mochi": (
        "MochiTransformer3DModel",
        {
            "num_layers": 2,
            "pooled_projection_dim": 24,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "max_sequence_length": 5,
            **_HEADS,
        },
        _mochi,
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 1},
        _chroma,
    ),
    "Cosmos": ("CosmosTransformer3DModel", _COSMOS, _cosmos),
    "Cosmos 2.5 with a picture": (
        "CosmosTransformer3DModel",
        {
            **_COSMOS,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 20,
            "encoder_hidden_states_channels": 24,
            "img_context_dim_in": 12,
            "img_context_dim_out": 32,
        },
        _cosmos_picture,
    ),
}


def small_transformer(name, seed=0):
    """(model, what it is called with): every parameter random, and some outputs of every layer far larger than the
    others; at its zero initialisation, a model would not depend on most of its layers.
    """
    diffusers = pytest.importorskip("diffusers")
    architecture, arguments, inputs = SMALL[name]
    torch.manual_seed(seed)
    model = getattr(diffusers, architecture)(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
            if parameter.dim() <= 2:
                parameter[3 :: max(parameter.shape[0] // 5, 1)] *= 5
    _GENERATED.manual_seed(seed)
    return model, inputs()
