"""An evaluation: the original, its noise floor, and what schemes make of it, on the same seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import __version__
from ..layer.grid import DEFAULT_ZERO_POINT
from ..model.calibration import DEFAULT_MOMENT_STEPS, DEFAULT_PICTURES, DEFAULT_STEP, Calibration
from ..model.chosen_steps import step_index
from ..model.conversion import quantize, quantized_layers
from ..model.observation import count_steps, linear_layers
from . import samples as on_disk
from .layers import layer_snr_db
from .metrics import (
    Difference,
    classifier_score,
    features_of,
    frechet_distance,
    frechet_excess,
    interval,
    mean_distance,
    variation,
)
from .samples import Request, digest, fingerprint
from .variants import NOISE_FLOOR, ORIGINAL, Variant

if TYPE_CHECKING:
    from ..integrations.samplers import Sampler

CALIBRATION_SEED = 50_000_000  # far from the seeds that are compared
OTHER_SEEDS = 10_000_000  # the first of the original's other seeds
TRAJECTORY_PICTURES = 8


@dataclass(frozen=True)
class Settings:
    """What is drawn of every model.

    Attributes:
        pictures: of each; batch: how many of them are drawn at once.
        calibration_pictures: of the run that calibrates, at the steps that :func:`~ditq_kernels.calibrate` takes by
            default.
    """

    pictures: int
    batch: int = 50
    first_seed: int = 0
    calibration_pictures: int = DEFAULT_PICTURES


@dataclass(frozen=True)
class Judge:
    """A classifier of the pictures.

    Attributes:
        name: as measures made with it are called.
        features: pictures to [B, num_features]; logits: pictures to [B, classes].
    """

    name: str
    features: Callable[[torch.Tensor], torch.Tensor]
    num_features: int
    logits: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What one variant came out as. Differences are to the original's pictures of the same seeds; for other seeds they
    say what a different picture of the same class or prompt is. Where pictures are decoded from latents, everything is
    of pictures, but for what is said by step and by layer.

    Attributes:
        finite: whether its pictures hold no NaN and no infinite value; if they do, they have no measures.
        psnr_db: mean over pictures, with a 95 % bootstrap interval; psnr_worst_db: of the worst picture.
        variation: total variation (differences of neighbouring pixels) relative to the original's: above 1 is more
            texture or noise, below 1 is blur.
        relative_l2_by_step: of the first few pictures, after each sampling step; None if a pipeline hides them.
        layer_snr_db: by linear layer: of its output, fed what the original's layer is fed in the calibrated step.
        frechet: Fréchet distance, by the judge's features, from the original's pictures of other seeds;
            frechet_of_means: its part that is the squared distance of the features' means.
        frechet_excess: how much more that is than of the original's, with a 95 % bootstrap interval.
        score: the judge's score (the inception score's formula); accuracy: share that it gives their class.
        bits_per_weight: of the quantized layers, scales included.
    """

    name: str
    scheme: str | None
    rounding: str | None
    finite: bool
    psnr_db: float | None
    psnr_interval_db: tuple[float, float] | None
    psnr_worst_db: float | None
    ssim: float | None
    relative_l2: float | None
    variation: float | None
    relative_l2_by_step: list[float] | None
    layer_snr_db: dict[str, float] | None
    frechet: float | None
    frechet_of_means: float | None
    frechet_excess: float | None
    frechet_excess_interval: tuple[float, float] | None
    score: float | None
    accuracy: float | None
    bits_per_weight: float | None


def _shapes(model: nn.Module) -> dict[str, str]:
    layers = linear_layers(model) | quantized_layers(model)
    return {name: f"{layer.in_features} to {layer.out_features}" for name, layer in layers.items()}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """To ``dtype``, but for what diffusers keeps in fp32."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = {name: x.data for name, x in _tensors(model) if names & set(name.split("."))}
    nn.Module.to(model, dtype=dtype)
    for name, x in _tensors(model):
        if name in kept:
            x.data = kept[name]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


class Evaluation:
    """Draws and judges variants of one model.

    Args:
        sampler: samples with the original, which is left as it was, or with another in its place.
        source: what the original is called in the samples' settings.
        directory: where the samples lie, a folder for each variant; what is there already is not drawn again.
        process, processes: this process, of how many that share the drawing.
    """

    def __init__(
        self,
        sampler: Sampler,
        source: str,
        settings: Settings,
        directory: Path,
        judge: Judge | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        (self.model,) = sampler.denoisers().values()
        self.sampler, self.source, self.settings = sampler, source, settings
        self.directory, self.judge, self.process, self.processes = directory, judge, process, processes
        self._calibrations: dict[bool, Calibration] = {}
        self._seen: dict[Variant, torch.Tensor] = {}  # features
        self._variations: dict[Variant, float] = {}
        beside = sampler.beside()
        self._beside = None if beside is None else digest(beside[0], *beside[1])
        self._fingerprints: dict[Path | None, str] = {}  # of sources, by directory
        self._last: tuple[Variant, nn.Module] | None = None

    def _first(self, count: int, first_seed: int) -> tuple[list[Any], list[int]]:
        """(subjects, seeds) of so many pictures."""
        subjects = self.sampler.subjects
        return [subjects[index % len(subjects)] for index in range(count)], list(range(first_seed, first_seed + count))

    def calibration(self, moments: bool) -> Calibration:
        """Of pictures that are not compared."""
        from ..integrations.samplers import calibrated

        if moments not in self._calibrations:
            runs = self.sampler.runs(*self._first(self.settings.calibration_pictures, CALIBRATION_SEED))
            self._calibrations[moments] = calibrated(self.model, runs, None, moments)
        return self._calibrations[moments]

    def variant_model(self, variant: Variant) -> nn.Module:
        """The original, or a copy of it as ``variant`` says; the last one made is kept."""
        if self._last is not None and self._last[0] == variant:
            return self._last[1]
        self._last = None  # before the next one takes its memory
        if variant.directory is not None:
            from ..integrations.source import load_source

            model = load_source(variant.directory, device=next(self.model.parameters()).device).transformer
            _cast(model, self.model.dtype)
            self._check_alike(variant.directory, model)
        elif variant.scheme is None and variant.dtype is None:
            model = self.model
        else:
            model = copy.deepcopy(self.model)
            if variant.dtype is not None:
                _cast(model, variant.dtype)
        if variant.scheme is not None:
            compensated = variant.rounding == "compensated"
            calibration = self.calibration(compensated) if variant.calibrated else None
            quantize(model, variant.scheme, calibration, rounding=variant.rounding, progress=False)
        self._last = variant, model
        return model

    def _check_alike(self, directory: Path, model: nn.Module) -> None:
        for name in ("in_channels", "sample_size", "num_embeds_ada_norm"):
            mine, theirs = self.model.config.get(name), model.config.get(name)
            if mine != theirs:
                raise ValueError(
                    f"{directory} holds another kind of model than the first source: {name} is {theirs} there, "
                    f"{mine} here"
                )
        mine, theirs = _shapes(self.model), _shapes(model)
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"{directory} holds another kind of model than the first source: the linear layer {name} is "
                    f"{theirs.get(name, 'missing')} there, {mine.get(name, 'missing')} here"
                )

    def request(self, variant: Variant) -> Request:
        """What is drawn of ``variant``."""
        settings, how = self.settings, self.sampler.how
        words = f"{self.source}: {variant.name}"
        if variant.scheme is not None:
            words += f" by ditq_kernels {__version__}, zero points {DEFAULT_ZERO_POINT}"
        if variant.calibrated:
            at = DEFAULT_MOMENT_STEPS if variant.rounding == "compensated" else DEFAULT_STEP
            words += f", calibrated at {at} on {settings.calibration_pictures} pictures"
        return Request(
            model=words,
            fingerprint=self._fingerprint(variant.directory),
            classes=len(self.sampler.subjects),
            count=settings.pictures,
            first_seed=settings.first_seed + (OTHER_SEEDS if variant.other_seeds else 0),
            steps=how.steps,
            guidance=how.guidance,
            batch=settings.batch,
        )

    def _fingerprint(self, directory: Path | None) -> str:
        if directory not in self._fingerprints:
            model = self.variant_model(Variant(str(directory), directory=directory)) if directory else self.model
            self._fingerprints[directory] = fingerprint(model, self.sampler.scheduler, self._beside)
        return self._fingerprints[directory]

    def folder(self, variant: Variant) -> Path:
        """Where its samples lie."""
        return self.directory / "".join(c if c.isalnum() or c == "_" else "-" for c in variant.name)

    def check(self, variant: Variant) -> None:
        """Raise ValueError if ``variant`` cannot be compared with the original, or its folder holds something else."""
        on_disk.check(self.request(variant), self.folder(variant))

    def draw(self, variant: Variant) -> int:
        """Draw what is missing of this process's share; how many batches."""
        request, folder = self.request(variant), self.folder(variant)
        share = dict(process=self.process, processes=self.processes)
        if not on_disk.missing(request, folder, **share):
            return 0
        model, shown, subjects = self.variant_model(variant), self.process == 0, self.sampler.subjects

        def sample(labels: list[int], seeds: list[int]) -> torch.Tensor:
            return self.sampler.sample(model, [subjects[label] for label in labels], seeds)

        return on_disk.draw(request, sample, folder, **share, progress=shown)

    def pictures(self, variant: Variant) -> Iterator[torch.Tensor]:
        """Batches of all pictures of ``variant``; they must have been drawn."""
        return map(self.sampler.decode, on_disk.batches(self.request(variant), self.folder(variant)))

    def first_pictures(self, variant: Variant, count: int) -> torch.Tensor:
        """The first ``count`` of :meth:`pictures`."""
        found: list[torch.Tensor] = []
        for batch in self.pictures(variant):
            found.append(batch)
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def row(self, variant: Variant) -> Row:
        """Judge what was drawn of ``variant``, and of the original and its other seeds."""
        finite = all(bool(torch.isfinite(batch).all()) for batch in self.pictures(variant))
        pairs = zip(self.pictures(variant), self.pictures(ORIGINAL), strict=True)
        found = Difference.of_batches(pairs) if finite and variant != ORIGINAL else None
        model = self.variant_model(variant)
        layers = quantized_layers(model).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        return Row(
            name=variant.name,
            scheme=variant.scheme,
            rounding=variant.rounding if variant.scheme else None,
            finite=finite,
            psnr_db=None if found is None else float(found.psnr_db.mean()),
            psnr_interval_db=None if found is None or self.settings.pictures < 2 else interval(found.psnr_db),
            psnr_worst_db=None if found is None else float(found.psnr_db.min()),
            ssim=None if found is None else float(found.ssim.mean()),
            relative_l2=None if found is None else found.relative_l2,
            variation=None if found is None else self._variation(variant) / self._variation(ORIGINAL),
            relative_l2_by_step=None if found is None else self._by_step(variant, model),
            layer_snr_db=None if variant == ORIGINAL or variant.other_seeds else self._by_layer(model),
            bits_per_weight=8 * sum(layer.nbytes for layer in layers) / weights if weights else None,
            **self._judged(variant, finite),
        )

    def _variation(self, variant: Variant) -> float:
        if variant not in self._variations:
            self._variations[variant] = variation(self.pictures(variant))
        return self._variations[variant]

    def _after_steps(self, model: nn.Module, first_seed: int) -> list[torch.Tensor]:
        """The samples after each step, of the first few pictures."""
        return self.sampler.after_steps(model, *self._first(self._few, first_seed))

    @property
    def _few(self) -> int:
        return min(TRAJECTORY_PICTURES, self.settings.pictures)

    @cached_property
    def _original_steps(self) -> list[torch.Tensor]:
        return self._after_steps(self.model, self.settings.first_seed)

    def _by_step(self, variant: Variant, model: nn.Module) -> list[float] | None:
        changed = self._after_steps(model, self.request(variant).first_seed)
        pairs = zip(changed, self._original_steps, strict=True)
        return [float((x - y).norm() / y.norm()) for x, y in pairs] or None

    def _by_layer(self, model: nn.Module) -> dict[str, float]:
        runs = self.sampler.runs(*self._first(self._few, CALIBRATION_SEED))
        step = step_index(DEFAULT_STEP, self._steps)
        return layer_snr_db(self.model, model, runs, step)

    @cached_property
    def _steps(self) -> int:
        """That a run has: some schedulers take others than asked for."""
        return count_steps(self.model, self.sampler.runs(*self._first(1, CALIBRATION_SEED))[0]).steps

    def _features(self, variant: Variant) -> torch.Tensor:
        if variant not in self._seen:
            self._seen[variant] = features_of(self.pictures(variant), self.judge.features)
        return self._seen[variant]

    def _judged(self, variant: Variant, finite: bool) -> dict[str, float | None]:
        distances = dict(frechet=None, frechet_of_means=None, frechet_excess=None, frechet_excess_interval=None)
        if self.judge is None or not finite:
            return dict(**distances, score=None, accuracy=None)
        if self.settings.pictures > self.judge.num_features:
            features, original, other = (self._features(one) for one in (variant, ORIGINAL, NOISE_FLOOR[0]))
            reference = original if variant.other_seeds else other
            distances["frechet"] = frechet_distance(features, reference)
            distances["frechet_of_means"] = mean_distance(features, reference)
        # A resample of a bootstrap holds two thirds as many different pictures.
        enough = self.settings.pictures >= 2 * self.judge.num_features
        if enough and variant != ORIGINAL and not variant.other_seeds:
            excess, bounds = frechet_excess(features, original, other)
            distances.update(frechet_excess=excess, frechet_excess_interval=bounds)
        logits = torch.cat([self.judge.logits(batch) for batch in self.pictures(variant)])
        labels = torch.tensor(self.request(variant).labels)
        return dict(
            **distances,
            score=classifier_score([logits.softmax(1)]),
            accuracy=float((logits.argmax(1) == labels).double().mean()),
        )
