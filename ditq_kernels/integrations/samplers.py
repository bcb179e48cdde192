"""Drawing with whatever a directory holds: a class-conditional DiT, or a pipeline that is given prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from ..model.calibration import Calibration, calibrate
from ..model.chosen_steps import StepChoice
from ..model.pipelines import is_denoiser, models_of
from ..model.steps import TIME
from .directories import CONFIG_FILE, PIPELINE_FILE, first_line, read_json
from .sampling import default_scheduler, sample
from .source import Source

CLASS_CONDITIONAL = "DiTTransformer2DModel"
GUIDANCE = ("true_cfg_scale", "guidance_scale")  # what pipelines call it; where there are both, the first is it
OF_VIDEOS = {"num_frames", "frames", "video_length", "video", "num_videos_per_prompt"}  # what only their calls take
CALLBACK = "callback_on_step_end"


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: None is what the pipeline does by itself."""

    steps: int
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None


class Sampler(Protocol):
    """Draws one picture per subject (a prompt, or a class) and seed.

    Attributes:
        how: all of them are drawn.
        subjects: the prompts, or all classes.
        scheduler: what it steps with.
    """

    how: Drawing
    subjects: Sequence[Any]
    scheduler: diffusers.SchedulerMixin

    def denoisers(self) -> dict[str, nn.Module]:
        """The models that are called in each step, by the component's name; "" for one that stands alone."""

    def runs(self, subjects: Sequence[Any], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        """The sampling runs, from beginning to end, that draw all that together."""

    def draw(self, subjects: Sequence[Any], seeds: Sequence[int]) -> list[torch.Tensor]:
        """For each subject and seed, pictures fp32 [frames, C, H, W] in [-1, 1], one frame if it is no video."""

    def sample(self, model: nn.Module, subjects: Sequence[Any], seeds: Sequence[int]) -> torch.Tensor:
        """fp32 [B, C, H, W] on the CPU, sampled with ``model`` in the place of the one denoiser."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1] of what :meth:`sample` returned."""

    def after_steps(self, model: nn.Module, subjects: Sequence[Any], seeds: Sequence[int]) -> list[torch.Tensor]:
        """fp32 [B, ...] on the CPU after each step of sampling with ``model``; none if the steps are not shown."""

    def beside(self) -> tuple[Any, list[nn.Module]] | None:
        """What decides the samples besides denoiser, scheduler and seed: in plain values, and models."""


class ClassSampler:
    """A DiT; subjects are indices of classes."""

    def __init__(self, source: Source, how: Drawing, progress: bool = True) -> None:
        self.source, self.how, self.progress = source, how, progress
        self.scheduler = source.scheduler or default_scheduler()
        self.subjects = range(source.transformer.config.num_embeds_ada_norm)

    def denoisers(self) -> dict[str, nn.Module]:
        return {"transformer" if self.source.is_pipeline else "": self.source.transformer}

    def runs(self, subjects: Sequence[int], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        return [lambda: self.sample(self.source.transformer, subjects, seeds)]

    def draw(self, subjects: Sequence[int], seeds: Sequence[int]) -> list[torch.Tensor]:
        return list(self.decode(self.sample(self.source.transformer, subjects, seeds)).unsqueeze(1))

    def sample(
        self,
        model: nn.Module,
        subjects: Sequence[int],
        seeds: Sequence[int],
        after_step: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        how = {} if self.how.guidance is None else {"guidance": self.how.guidance}
        how |= dict(steps=self.how.steps, progress=self.progress, after_step=after_step)
        return sample(model, self.scheduler, subjects, seeds, **how)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return self.source.decode(samples)

    def after_steps(self, model: nn.Module, subjects: Sequence[int], seeds: Sequence[int]) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        self.sample(model, subjects, seeds, after_step=lambda x: seen.append(x.float().cpu()))
        return seen

    def beside(self) -> None:
        return None


class PromptSampler:
    """A pipeline; subjects are prompts. One picture is drawn at a time, and depends on its prompt and seed alone."""

    def __init__(self, pipeline: Any, prompts: Sequence[str], how: Drawing, progress: bool = True) -> None:
        self.pipeline, self.subjects, self.how = pipeline, prompts, how
        self.scheduler = pipeline.scheduler
        self._takes = inspect.signature(pipeline.__call__).parameters
        pipeline.set_progress_bar_config(leave=False, disable=not progress)

    def denoisers(self) -> dict[str, nn.Module]:
        return {name: one for name, one in models_of(self.pipeline).items() if is_denoiser(name)}

    def runs(self, subjects: Sequence[str], seeds: Sequence[int]) -> list[Callable[[], Any]]:
        return [partial(self._call, prompt, seed, "latent") for prompt, seed in zip(subjects, seeds, strict=True)]

    def draw(self, subjects: Sequence[str], seeds: Sequence[int]) -> list[torch.Tensor]:
        drawn = [self._call(prompt, seed, "pt") for prompt, seed in zip(subjects, seeds, strict=True)]
        return [(one.frames[0] if hasattr(one, "frames") else one.images).float().cpu() * 2 - 1 for one in drawn]

    def sample(self, model: nn.Module, subjects: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        with self._with(model):
            return torch.cat(self.draw(subjects, seeds)).contiguous()

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return samples  # the pipeline has done so

    def after_steps(self, model: nn.Module, subjects: Sequence[str], seeds: Sequence[int]) -> list[torch.Tensor]:
        if CALLBACK not in self._takes or "latents" not in self.pipeline._callback_tensor_inputs:
            return []
        with self._with(model):
            runs = [self._latents(prompt, seed) for prompt, seed in zip(subjects, seeds, strict=True)]
        return [torch.cat(latents) for latents in zip(*runs, strict=True)]

    def beside(self) -> tuple[Any, list[nn.Module]]:
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        others = {name: part for name, part in parts.items() if not is_denoiser(name)}
        words = [
            *(type(self.pipeline).__name__, settings_of(self.pipeline), list(self.subjects), asdict(self.how)),
            {name: settings_of(part) for name, part in others.items()},
        ]
        return words, list(others.values())

    @contextmanager
    def _with(self, model: nn.Module) -> Iterator[None]:
        """The pipeline samples with ``model``."""
        ((name, original),) = self.denoisers().items()
        setattr(self.pipeline, name, model)
        try:
            with _fed_in(original.dtype, model):
                yield
        finally:
            setattr(self.pipeline, name, original)

    def _latents(self, prompt: str, seed: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def see(pipeline: Any, step: int, time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            seen.append(tensors["latents"].float().cpu())
            return tensors

        self._call(prompt, seed, "latent", {CALLBACK: see})
        return seen

    def _call(self, prompt: str, seed: int, form: str, watched: Mapping[str, Any] | None = None) -> Any:
        """What the pipeline returns; its latents are in ``form``."""
        sizes = {name: getattr(self.how, name) for name in ("height", "width", "num_frames")}
        how: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        scale = next((name for name in GUIDANCE if name in self._takes), None)
        if self.how.guidance is not None and scale is not None:
            how[scale] = self.how.guidance
            if scale == GUIDANCE[0] and self.how.guidance != 1:
                how["negative_prompt"] = " "  # without one there is nothing to guide away from
        how |= dict(num_inference_steps=self.how.steps, output_type=form)
        noise = torch.Generator().manual_seed(seed)
        try:
            return self.pipeline(prompt=prompt, generator=noise, **how, **(watched or {}))
        except (RuntimeError, TypeError, ValueError) as error:  # many of which a size that it cannot draw brings about
            asked = ", ".join(f"{name} = {value!r}" for name, value in how.items())
            raise ValueError(
                f"{type(self.pipeline).__name__} could not draw with {asked}: {first_line(error)}"
            ) from error


@contextmanager
def _fed_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """In a pipeline that works in ``dtype``, ``model`` computes in its own; times are left as exact as they come."""
    if model.dtype == dtype:
        yield
        return
    names = list(inspect.signature(model.forward).parameters)

    def cast(values: Any, to: torch.dtype) -> Any:
        return tree_map(lambda x: x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, values)

    def before(_: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        own = model.dtype
        args = tuple(x if name in TIME else cast(x, own) for name, x in zip(names, args, strict=False))
        return args, {name: x if name in TIME else cast(x, own) for name, x in given.items()}

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda _, args, output: cast(output, dtype)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def settings_of(configured: Any) -> dict[str, Any]:
    """How something of diffusers or transformers is configured."""
    config = configured.config
    values = config if isinstance(config, Mapping) else config.to_dict()
    # diffusers' own notes begin with _, and the order of some differs between processes.
    return {name: value for name, value in values.items() if not name.startswith("_")}


def calibrated(
    model: nn.Module, runs: Sequence[Callable[[], Any]], step: StepChoice | None, moments: bool
) -> Calibration:
    """From one step of each of ``runs``, or several, as :func:`calibrate` takes them; all runs have as many steps."""
    found: Calibration | None = None
    for run in tqdm(runs, desc="calibrate", unit="run", leave=False, disable=len(runs) == 1):
        if found is None:
            found = calibrate(model, run, step, moments=moments)
            step = found.observed  # counted once
        else:
            found = Calibration.merged([found, calibrate(model, run, step, moments=moments)])
    return found


def _pipeline_call(path: Path) -> tuple[str, Mapping[str, inspect.Parameter]]:
    """The name of the pipeline's class in ``path``, and what its call takes."""
    name = str(read_json(path / PIPELINE_FILE).get("_class_name"))
    cls = getattr(diffusers, name, None)
    return name, inspect.signature(cls.__call__).parameters if isinstance(cls, type) else {}


def takes_prompts(path: Path) -> bool:
    """Whether what is in ``path`` is sampled with prompts, or else with classes; decided without loading it.

    Raises:
        ValueError: if it is neither, naming the way out.
    """
    in_python = "in Python, ditq.calibrate and ditq.quantize take any model and any way to sample"
    if (path / PIPELINE_FILE).is_file():
        name, takes = _pipeline_call(path)
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


def check_draws_pictures(path: Path) -> None:
    """Raise ValueError unless the pipeline in ``path`` draws pictures, with one model; decided without loading it."""
    name, takes = _pipeline_call(path)
    elsewhere = "ditq generate draws with it"
    if OF_VIDEOS & takes.keys():
        raise ValueError(f"{path} holds a {name}, which draws videos, and only pictures are compared; {elsewhere}")
    models = [part for part in read_json(path / PIPELINE_FILE) if is_denoiser(part) and (path / part).is_dir()]
    if len(models) != 1:
        found = " and ".join(models) or "no model"
        raise ValueError(f"{path} samples with {found}, and only one model is exchanged for others; {elsewhere}")
