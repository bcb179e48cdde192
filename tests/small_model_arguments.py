"""How any model of diffusers is built small: by rules over its constructor's defaults, and a table for what they do not
fit; and which classes have nothing to quantize, or to store.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from small_transformers import SMALL
from torch import nn

LARGEST = 64  # of a width, a length, a vocabulary: two heads of 32 channels
HOW_MANY = re.compile(r"(.*_)?(num|n)_.*(layers|blocks|heads)|(.*_)?depth|nlayers|n?heads|mmdit_layers|n_layer|n_head")
IN_A_LEVEL = re.compile(r".*layers_per_.*block")
HEAD_WIDTH = re.compile(r"(.*_)?head_dim|dim_heads|d_kv")
AXES = re.compile(r"(rope_)?axes_dims?(_rope|_a)?|rope_(axes_)?dim(_list)?")
WIDTHS_OF_AXES = {2: (16, 16), 3: (8, 12, 12), 4: (8, 8, 8, 8)}  # of positions, by how many: a head's together


def _small(name: str, default: Any) -> Any:
    if isinstance(default, (tuple, list)) and all(type(one) is int for one in default):
        widths = WIDTHS_OF_AXES[len(default)] if AXES.fullmatch(name) else [_small(name, one) for one in default]
        return type(default)(widths)
    if type(default) is not int:
        return default
    if IN_A_LEVEL.fullmatch(name):
        return 1
    if HEAD_WIDTH.fullmatch(name):
        return 32
    return min(default, 2 if HOW_MANY.fullmatch(name) else LARGEST)


def small_arguments(cls: type) -> dict[str, Any]:
    """Of the constructor of ``cls``, a model of diffusers."""
    known = [given for architecture, given, _ in SMALL.values() if architecture == cls.__name__]
    if known:
        return known[0]
    parameters = inspect.signature(cls.__init__).parameters
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    chosen = {name: _small(name, default) for name, default in defaults.items()}
    if "block_out_channels" in chosen:  # a UNet or alike, where this may mean the number of heads
        chosen.pop("attention_head_dim", None)
    if "down_block_types" in chosen:  # first and last of its levels, and of all that is said of each
        levels = len(chosen["down_block_types"])
        chosen = {
            name: type(value)([value[0], value[-1]])
            if isinstance(value, (tuple, list)) and len(value) == levels
            else value
            for name, value in chosen.items()
        }
    changed = {name: value for name, value in chosen.items() if value != defaults[name]}
    return changed | OTHERS.get(cls.__name__, {})


def build(cls: type) -> nn.Module:
    """A small model of random weights."""
    import diffusers

    torch.manual_seed(0)
    if cls.__name__ in SIDE_BY_SIDE:
        part = getattr(diffusers, SIDE_BY_SIDE[cls.__name__])
        return cls([build(part), build(part)])
    model = cls(**small_arguments(cls)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


_HUNYUAN_DIT = {"in_channels": 4, "patch_size": 2, "activation_fn": "gelu-approximate"}

# Arguments that have no default, or depend on others, or leave nothing or a lot where they are as the rules say.
OTHERS: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {"text_encoder_dim": 64, "text_encoder_1_dim": 64, "langauge_model_dim": 64},
    "AutoencoderDC": {  # as those that are published, with attention in its last level
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (32, 64),
        "decoder_block_out_channels": (32, 64),
        "encoder_layers_per_block": (2, 2),
        "decoder_layers_per_block": (2, 2),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 16,
    },
    "AutoencoderRAE": {"encoder_patch_size": 16},
    "AutoencoderSAME": {"encoder_channels": 16, "encoder_transformer_depths": (2,), "dim_heads": 32},
    "ControlNetUnionModel": {"addition_time_embed_dim": 64},
    "DreamLiteTransformer2DModel": {"in_channels": 64, "num_layers": 2},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": (64, 64), "llama_layers": (0, 1)},
    "HunyuanDiT2DControlNetModel": {**_HUNYUAN_DIT, "transformer_num_layers": 6},
    "LTX2VideoDiffusionDecoderModel": {
        "decoder_stage_channels": (256, 128, 64, 64, 32),
        "decoder_stage_depths": (2, 2, 2, 2, 2),
    },
    "LatteTransformer3DModel": {"in_channels": 4, "patch_size": 2, "num_layers": 2, "caption_channels": 64},
    "LuminaNextDiT2DModel": {"num_kv_heads": 2},
    "MotionAdapter": {"block_out_channels": (64, 64)},
    "OmniGenTransformer2DModel": {
        "pad_token_id": 0,
        "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    },
    "PRXTransformer2DModel": {"axes_dim": (16, 16)},
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[1] * 37], "allowed_residue_types": [[1]]},
    "StableAudioProjectionModel": {"text_encoder_dim": 64, "conditioning_dim": 64, "min_value": 0, "max_value": 9},
    "Transformer2DModel": {"in_channels": 64, "num_layers": 2},
    "TransformerTemporalModel": {"in_channels": 64, "num_layers": 2},
    "UniDiffuserModel": {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4},
    "UniDiffuserTextDecoder": {"prefix_length": 4, "prefix_inner_dim": 768},
    "VQModel": {  # as Kandinsky's, with attention in its last level
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "norm_type": "spatial",
        "vq_embed_dim": 4,
    },
    "WanAnimateTransformer3DModel": {"motion_encoder_channel_sizes": {str(4 << n): 8 for n in range(9)}},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 1],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 16,
    },
}

# Classes whose model is two of another, side by side.
SIDE_BY_SIDE: dict[str, str] = {
    "FluxMultiControlNetModel": "FluxControlNetModel",
    "HunyuanDiT2DMultiControlNetModel": "HunyuanDiT2DControlNetModel",
    "MultiAdapter": "T2IAdapter",
    "MultiControlNetModel": "ControlNetModel",
    "QwenImageMultiControlNetModel": "QwenImageControlNetModel",
    "SD3MultiControlNetModel": "SD3ControlNetModel",
}

# Only a large layer outside repeated blocks is quantized, which no small model has.
LARGE_LAYERS_ONLY = {"Ideogram4PromptEnhancerHead", "ReduxImageEncoder"}

# What cannot be tested, and why; each reason is checked.
NO_LINEAR_LAYERS = "it has no linear layers"
NONE_REPEATED = "its few linear layers are in no repeated blocks"
NOT_STORED = "diffusers cannot store it and load it again"
UNTESTED: dict[str, str] = {
    **dict.fromkeys(
        (
            "AutoencoderKLCogVideoX",
            "AutoencoderKLCosmos",
            "AutoencoderKLHunyuanImage",
            "AutoencoderKLHunyuanImageRefiner",
            "AutoencoderKLHunyuanVideo15",
            "AutoencoderKLKVAE",
            "AutoencoderKLKVAEVideo",
            "AutoencoderKLLTX2Audio",
            "AutoencoderKLLTX2Video",
            "AutoencoderKLLTXVideo",
            "AutoencoderKLMagvit",
            "AutoencoderKLQwenImage",
            "AutoencoderKLQwenImage21",
            "AutoencoderKLWan",
            "AutoencoderOobleck",
            "AutoencoderTiny",
            "AutoencoderVidTok",
            "Cosmos3AVAEAudioTokenizer",
            "Kandinsky6SRLatentUpscalerBank",
            "Kandinsky6SRVAE",
            "LongCatAudioDiTVae",
            "MMAudioVAE",
            "MMAudioVocoder",
            "MiniMaxMusic3ConditionEncoder",
            "MiniMaxMusic3Vocoder",
            "MultiAdapter",
            "T2IAdapter",
        ),
        NO_LINEAR_LAYERS,
    ),
    **dict.fromkeys(
        (
            "AsymmetricAutoencoderKL",
            "AudioLDM2ProjectionModel",
            "AutoencoderKL",
            "AutoencoderKLAllegro",
            "AutoencoderKLFlux2",
            "AutoencoderKLHunyuanVideo",
            "AutoencoderKLKVAEAudio",
            "AutoencoderKLMiniMaxH3Audio",
            "AutoencoderKLTemporalDecoder",
            "CLIPImageProjection",
            "StableAudio3DurationEmbedder",
            "StableAudioProjectionModel",
            "UniDiffuserTextDecoder",
        ),
        NONE_REPEATED,
    ),
    **dict.fromkeys(
        (
            "FluxMultiControlNetModel",
            "HunyuanDiT2DMultiControlNetModel",
            "QwenImageMultiControlNetModel",
            "SD3MultiControlNetModel",
        ),
        NOT_STORED,
    ),
}
