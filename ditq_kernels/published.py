"""Models whose steps are traced: as published, and what one step is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DTYPE = torch.bfloat16
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Attributes:
    cls: its class in diffusers.
    config: what it is built with, where that differs from the class's defaults.
    depths: the argument that says how many blocks there are, by the name of their list in the model.
    inputs: of one step; floating-point ones in bf16, none of them with contents.
    calls: of the transformer in a step; two where guidance has a call of its own.
    about: what the step is of.
    """

    cls: str
    config: Mapping[str, Any]
    depths: Mapping[str, str]
    inputs: Callable[[], Arguments]
    about: str
    calls: int = 1

    def build(self, blocks: int | None = None) -> nn.Module:
        """The model on the meta device, in bf16; ``blocks``: of each kind, None as many as are published."""
        import diffusers

        depths = {} if blocks is None else dict.fromkeys(self.depths.values(), blocks)
        with torch.device("meta"):
            model = getattr(diffusers, self.cls)(**{**self.config, **depths})
        return nn.Module.to(model.eval().requires_grad_(False), DTYPE)  # diffusers' own says that it casts

    def blocks(self) -> dict[str, int]:
        """How many blocks of each list there are."""
        import inspect

        import diffusers

        defaults = inspect.signature(getattr(diffusers, self.cls)).parameters
        return {name: self.config.get(key, defaults[key].default) for name, key in self.depths.items()}


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")


def _integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _dit(side: int) -> Callable[[], Arguments]:
    # Both halves of guidance in one batch.
    return lambda: dict(hidden_states=_floats(2, 4, side, side), timestep=_integers(2), class_labels=_integers(2))


def _pixart() -> Arguments:
    return dict(
        hidden_states=_floats(2, 4, 128, 128),
        encoder_hidden_states=_floats(2, 300, 4096),
        encoder_attention_mask=_floats(2, 300),
        timestep=_integers(2),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )


def _sd3() -> Arguments:
    return dict(
        hidden_states=_floats(2, 16, 128, 128),
        encoder_hidden_states=_floats(2, 333, 4096),
        pooled_projections=_floats(2, 2048),
        timestep=_integers(2),
    )


def _flux() -> Arguments:
    return dict(
        hidden_states=_floats(1, 4096, 64),
        encoder_hidden_states=_floats(1, 512, 4096),
        pooled_projections=_floats(1, 768),
        timestep=_floats(1),
        guidance=_floats(1),
        img_ids=_floats(4096, 3),
        txt_ids=_floats(512, 3),
    )


def _wan(frames: int, height: int, width: int) -> Callable[[], Arguments]:
    return lambda: dict(
        hidden_states=_floats(1, 16, frames, height, width),
        encoder_hidden_states=_floats(1, 512, 4096),
        timestep=_integers(1),
    )


_BLOCKS = {"transformer_blocks": "num_layers"}
_XL = dict(num_attention_heads=16, attention_head_dim=72, out_channels=8)
_PIXART = dict(caption_channels=4096, use_additional_conditions=False, interpolation_scale=2)
_SD35_LARGE = dict(
    caption_projection_dim=2432, num_attention_heads=38, num_layers=38, pos_embed_max_size=192, qk_norm="rms_norm"
)
_WAN_SMALL = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)

# Sources: the models' public configurations (config.json), and what their pipelines in diffusers hand over.
MODELS = {
    "dit-xl-2-256": Model(
        "DiTTransformer2DModel",
        dict(**_XL, num_layers=28, sample_size=32),
        _BLOCKS,
        _dit(32),
        "DiT-XL/2, 256 px, one picture with guidance in one batch",
    ),
    "dit-xl-2-512": Model(
        "DiTTransformer2DModel",
        dict(**_XL, num_layers=28, sample_size=64),
        _BLOCKS,
        _dit(64),
        "DiT-XL/2, 512 px, one picture with guidance in one batch",
    ),
    "pixart-sigma-1024": Model(
        "PixArtTransformer2DModel",
        _PIXART,
        _BLOCKS,
        _pixart,
        "PixArt-Sigma XL/2, 1024 px, one picture with guidance in one batch",
    ),
    "sd3.5-large-1024": Model(
        "SD3Transformer2DModel",
        _SD35_LARGE,
        _BLOCKS,
        _sd3,
        "Stable Diffusion 3.5 large, 1024 px, one picture with guidance in one batch",
    ),
    "flux.1-dev-1024": Model(
        "FluxTransformer2DModel",
        dict(guidance_embeds=True),
        {**_BLOCKS, "single_transformer_blocks": "num_single_layers"},
        _flux,
        "FLUX.1 dev, 1024 px, one picture",
    ),
    "wan2.1-1.3b-480p": Model(
        "WanTransformer3DModel",
        _WAN_SMALL,
        {"blocks": "num_layers"},
        _wan(21, 60, 104),
        "Wan 2.1 1.3B, 81 frames of 832 x 480 px, guidance in a second call",
        calls=2,
    ),
    "wan2.1-14b-720p": Model(
        "WanTransformer3DModel",
        {},
        {"blocks": "num_layers"},
        _wan(21, 90, 160),
        "Wan 2.1 14B, 81 frames of 1280 x 720 px, guidance in a second call",
        calls=2,
    ),
}
