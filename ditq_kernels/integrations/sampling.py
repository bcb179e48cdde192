"""Class-conditional sampling of any diffusers ``DiTTransformer2DModel``, whatever its number of classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..files import written_whole
from .pictures import to_levels

# diffusers' own settings for DiT-XL/2, for models that come without a scheduler.
DEFAULT_SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
)


def default_scheduler() -> DDIMScheduler:
    """DDIM over the linear schedule that DiT was trained with, predicting noise."""
    return DDIMScheduler(**DEFAULT_SCHEDULE)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(model: nn.Module, seeds: Sequence[int]) -> torch.Tensor:
    """fp32 [B, C, H, W] on the CPU, each picture from a generator of its own: it depends on nothing but its seed."""
    return _draw(model, _generators(seeds))


def _draw(model: nn.Module, generators: Sequence[torch.Generator]) -> torch.Tensor:
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: SchedulerMixin,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 2.0,
    progress: bool = True,
    after_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample one picture (or latent) per label and seed, on the model's device and in its dtype.

    Classifier-free guidance runs as one batch of twice the size; with ``guidance == 1`` the unconditional half is left
    out.

    Args:
        after_step: sees the samples after each step, on the model's device.

    Returns:
        fp32 [B, C, H, W] on the CPU.

    Raises:
        ValueError: if there are no labels, fewer or more than seeds, or one is not a class of the model's.
    """
    classes = model.config.num_embeds_ada_norm
    if not labels:
        raise ValueError("at least one label and seed is needed")
    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels but {len(seeds)} seeds: one seed per picture is needed")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise ValueError(f"class {wrong[0]} does not exist: this model's classes are 0 to {classes - 1}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    parameter = next(p for p in model.parameters() if p.dtype.is_floating_point)
    device, dtype = parameter.device, getattr(model, "dtype", parameter.dtype)
    guided = guidance != 1
    scheduler.set_timesteps(steps, device=device)
    generators = _generators(seeds)
    x = _draw(model, generators).to(device) * scheduler.init_noise_sigma
    # Schedulers that add noise draw it from the pictures' own generators too.
    noise_source = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    y = torch.tensor(list(labels), device=device)
    if guided:
        y = torch.cat([y, torch.full_like(y, classes)])  # the embedding's last row stands for "no class"
    for t in tqdm(scheduler.timesteps, desc="sampling", unit="step", leave=False, disable=not progress):
        batch = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t).to(dtype)
        prediction = model(batch, timestep=t.expand(len(batch)), class_labels=y).sample
        prediction = prediction[:, : x.shape[1]].float()  # models that also learn a variance put it behind
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(prediction, t, x, **noise_source).prev_sample
        if after_step is not None:
            after_step(x)
    return x.float().cpu()


def save_grid(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """Write pictures [B, C, H, W] in [-1, 1], C 1 or 3, as one PNG of rows of ``columns``."""
    levels = to_levels(pictures)
    count, channels, height, width = levels.shape
    grid = levels.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(count // columns * height, columns * width, channels).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(unfinished, format="PNG")
