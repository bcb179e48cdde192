"""Drawing by the command line, with whatever a directory holds: a class-conditional DiT, or a pipeline that is given
prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from torch import nn

from ..model.pipelines import is_denoiser, models_of
from .directories import CONFIG_FILE, PIPELINE_FILE, first_line, load_pipeline, read_json
from .sampling import default_scheduler, sample
from .source import Source, load_source

CLASS_CONDITIONAL = "DiTTransformer2DModel"
GUIDANCE = ("true_cfg_scale", "guidance_scale")  # what pipelines call it; where there are both, the first is it


class Sampler(Protocol):
    """Draws one picture per subject (a prompt, or a class) and seed."""

    def denoisers(self) -> dict[str, nn.Module]:
        """The models that are called in each step, by the component's name; "" for one that stands alone."""

    def runs(self, subjects: Sequence[Any], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        """The sampling runs, from beginning to end, that draw all that together."""

    def draw(self, subjects: Sequence[Any], seeds: Sequence[int]) -> list[torch.Tensor]:
        """For each subject and seed, pictures fp32 [frames, C, H, W] in [-1, 1], one frame if it is no video."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: None is what the pipeline does by itself."""

    steps: int
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None


class ClassSampler:
    """A DiT in ``path``; subjects are indices of classes."""

    def __init__(self, path: Path, how: Drawing, device: str | None = None, with_vae: bool = True) -> None:
        self.source: Source = load_source(path, device=device, with_vae=with_vae)
        self.how, self.with_vae = how, with_vae
        if with_vae:
            self.source.check_decodable()

    def denoisers(self) -> dict[str, nn.Module]:
        return {"transformer" if self.source.is_pipeline else "": self.source.transformer}

    def runs(self, subjects: Sequence[int], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        return [lambda: self.draw(subjects, seeds)]

    def draw(self, subjects: Sequence[int], seeds: Sequence[int]) -> list[torch.Tensor]:
        scheduler = self.source.scheduler or default_scheduler()
        guidance = {} if self.how.guidance is None else {"guidance": self.how.guidance}
        samples = sample(self.source.transformer, scheduler, subjects, seeds, steps=self.how.steps, **guidance)
        return list((self.source.decode(samples) if self.with_vae else samples).unsqueeze(1))


class PromptSampler:
    """A pipeline in ``path``; subjects are prompts. One picture is drawn at a time, and depends on its prompt and seed
    alone.
    """

    def __init__(self, path: Path, how: Drawing, device: str | None = None, with_vae: bool = True) -> None:
        self.pipeline = load_pipeline(path)
        if device is not None:
            self.pipeline.to(device)
        self.how, self.with_vae = how, with_vae

    def denoisers(self) -> dict[str, nn.Module]:
        return {name: one for name, one in models_of(self.pipeline).items() if is_denoiser(name)}

    def runs(self, subjects: Sequence[str], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        return [partial(self._draw, prompt, seed) for prompt, seed in zip(subjects, seeds, strict=True)]

    def draw(self, subjects: Sequence[str], seeds: Sequence[int]) -> list[torch.Tensor]:
        return [run() for run in self.runs(subjects, seeds)]

    def _draw(self, prompt: str, seed: int) -> torch.Tensor:
        takes = inspect.signature(self.pipeline.__call__).parameters
        self.pipeline.set_progress_bar_config(leave=False)
        sizes = {name: getattr(self.how, name) for name in ("height", "width", "num_frames")}
        how: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        scale = next((name for name in GUIDANCE if name in takes), None)
        if self.how.guidance is not None and scale is not None:
            how[scale] = self.how.guidance
            if scale == GUIDANCE[0] and self.how.guidance != 1:
                how["negative_prompt"] = " "  # without one there is nothing to guide away from
        how |= dict(num_inference_steps=self.how.steps, output_type="pt" if self.with_vae else "latent")
        try:
            drawn = self.pipeline(prompt=prompt, generator=torch.Generator().manual_seed(seed), **how)
        except (RuntimeError, TypeError, ValueError) as error:  # many of which a size that it cannot draw brings about
            asked = ", ".join(f"{name} = {value!r}" for name, value in how.items())
            raise ValueError(
                f"{type(self.pipeline).__name__} could not draw with {asked}: {first_line(error)}"
            ) from error
        found = drawn.frames[0] if hasattr(drawn, "frames") else drawn.images
        return found.float().cpu() * 2 - 1


def takes_prompts(path: Path) -> bool:
    """Whether what is in ``path`` is sampled with prompts, or else with classes; decided without loading it.

    Raises:
        ValueError: if it is neither, naming the way out.
    """
    in_python = "in Python, ditq.calibrate and ditq.quantize take any model and any way to sample"
    if (path / PIPELINE_FILE).is_file():
        name = str(read_json(path / PIPELINE_FILE).get("_class_name"))
        cls = getattr(diffusers, name, None)
        takes = inspect.signature(cls.__call__).parameters if isinstance(cls, type) else {}
        if name == "DiTPipeline" or "prompt" not in takes:
            config = path / "transformer" / CONFIG_FILE
            if config.is_file() and read_json(config).get("_class_name") == CLASS_CONDITIONAL:
                return False
            if not (path / "transformer").is_dir():
                raise ValueError(f"the pipeline in {path} has no transformer/: it is not a diffusion transformer's")
            raise ValueError(f"{path} holds a {name}, which takes neither prompts nor classes; {in_python}")
        return True
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    # Older checkpoints of ours hold no config.json, and configurations of transformers no name of a class.
    name = config.get("_class_name", config.get("model_type", CLASS_CONDITIONAL))
    if name != CLASS_CONDITIONAL:
        raise ValueError(f"{path} holds a {name} alone; give the pipeline that samples with it, or {in_python}")
    return False
