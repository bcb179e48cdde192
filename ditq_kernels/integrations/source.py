"""A class-conditional model in a directory, to sample from, and what stands beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from torch import nn

from ..checkpoint.manifest import MANIFEST_FILE
from .directories import CONFIG_FILE, PIPELINE_FILE, load_model, local, read_json

PICTURE_CHANNELS = (1, 3)  # a model of other than these samples latents
LABEL_FILE = "class_names.json"  # beside a bare model: a JSON list of its classes' names


@dataclass
class Source:
    """A model to sample from, and what stands beside it.

    Attributes:
        path: the directory that it was loaded from.
        transformer: the model itself, quantized or not.
        scheduler: the one beside it, or None.
        vae: the autoencoder of a latent model, or None.
        is_pipeline: whether ``path`` is a pipeline's directory, with the model in ``transformer/``.
        labels: class names to indices, where the directory has them.
    """

    path: Path
    transformer: nn.Module
    scheduler: diffusers.SchedulerMixin | None = None
    vae: nn.Module | None = None
    is_pipeline: bool = False
    labels: dict[str, int] = field(default_factory=dict)

    def check_decodable(self) -> None:
        """Raise ValueError if the samples are latents and there is no autoencoder to decode them."""
        channels = self.transformer.config.in_channels
        if self.vae is None and channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"{self.path} samples latents of {channels} channels and has no autoencoder to decode them; "
                "give a pipeline directory, with vae/ beside transformer/"
            )

    @torch.no_grad()
    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures, fp32 [B, C, H, W] in [-1, 1], of what was sampled; ValueError as :meth:`check_decodable`."""
        self.check_decodable()
        if self.vae is None:
            return samples
        latents = samples.to(device=self.vae.device, dtype=self.vae.dtype)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float().cpu()


def _load_scheduler(directory: Path) -> diffusers.SchedulerMixin | None:
    if not directory.is_dir():
        return None
    name = str(read_json(directory / "scheduler_config.json").get("_class_name", ""))
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"{directory} names no scheduler class of diffusers {diffusers.__version__}: {name!r}")
    return cls.from_pretrained(directory)


def load_source(
    source: str | os.PathLike, *, device: torch.device | str | None = None, with_vae: bool = False
) -> Source:
    """Load a pipeline directory, a bare model's, a quantized one of either kind, or a model from the hub.

    Weights keep the dtype in which they are stored. The autoencoder is loaded only ``with_vae``.

    Raises:
        FileNotFoundError: if ``source`` is no directory and the hub does not give it.
        ValueError: if the directory holds no model that can be loaded.
    """
    path = local(source)
    is_pipeline = (path / PIPELINE_FILE).exists()
    if not is_pipeline and not any((path / name).exists() for name in (MANIFEST_FILE, CONFIG_FILE)):
        raise ValueError(
            f"{path} holds neither {PIPELINE_FILE} nor {CONFIG_FILE} nor {MANIFEST_FILE}: no model is there"
        )
    labels: dict[str, int] = {}
    vae = None
    if is_pipeline:
        if not (path / "transformer").is_dir():
            raise ValueError(f"the pipeline in {path} has no transformer/: it is not a diffusion transformer's")
        for index, names in read_json(path / PIPELINE_FILE).get("id2label", {}).items():
            labels.update({name.strip(): int(index) for name in names.split(",")})
        if with_vae and (path / "vae").is_dir():
            vae = diffusers.AutoencoderKL.from_pretrained(path / "vae").eval()
            vae = vae.to(device) if device is not None else vae
    elif (path / LABEL_FILE).exists():
        labels = {name: index for index, name in enumerate(read_json(path / LABEL_FILE, list))}
    transformer = load_model(path / "transformer" if is_pipeline else path)
    transformer = transformer.to(device) if device is not None else transformer
    return Source(path, transformer, _load_scheduler(path / "scheduler"), vae, is_pipeline, labels)
