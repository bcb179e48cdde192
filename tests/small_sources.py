"""Directories that ``ditq`` reads: diffusers models and pipelines small enough to sample on a CPU within a test."""

import hashlib
from pathlib import Path

import pytest
import torch

CLASS_NAMES = ("cat", "dog", "fish")


def small_dit(*, classes=3, channels=1, learns_variance=False, sample_size=8, heads=2, head_dim=32, layers=1, seed=0):
    """A diffusers DiT with every parameter random: at its zero initialisation, no picture would depend on its class."""
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels * (2 if learns_variance else 1),
        num_layers=layers,
        sample_size=sample_size,
        patch_size=2 if sample_size < 28 else 4,
        num_embeds_ada_norm=classes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def small_vae(seed=0):
    """4 latent channels of 8 x 8 to pictures of 3 channels, 16 x 16."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def small_pipeline(classes=1000):
    """A DiTPipeline as DiT-XL/2's: latents, a learned variance, 1000 classes (the pipeline's null class is 1000)."""
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DiTPipeline

    model = small_dit(classes=classes, channels=4, learns_variance=True)
    return DiTPipeline(model, small_vae(), DDIMScheduler(clip_sample=False))


def digests(directory: Path) -> dict[str, str]:
    """The sha256 of every file below ``directory``, to tell whether something changed."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
