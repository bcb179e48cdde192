"""The main job on the embedded model: calibrate from one step, quantize by every scheme, draw the same pictures,
compare.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from ..evaluation.metrics import difference
from ..evaluation.variants import ORIGINAL, Variant, variants
from ..integrations.pictures import to_unit_range
from ..integrations.sampling import sample
from ..integrations.source import Source, load_source
from ..layer.backend import selected_backend
from ..layer.formats import RECOMMENDED
from ..model.calibration import DEFAULT_PICTURES, Calibration, calibrate
from ..model.conversion import quantized_layers
from ..model.pipelines import quantize
from . import MODEL_DIRECTORY, bf16
from .classifier import accuracy, load_classifier

EMULATED_STEPS = 3  # of a model whose products PyTorch emulates: as many as time needs


@dataclass(frozen=True)
class Settings:
    """What is sampled: classes 0 .. classes - 1 with seeds 0 .. seeds - 1, one batch."""

    classes: int = 10
    seeds: int = 2
    steps: int = 50
    guidance: float = 2.0
    device: str = "cpu"

    @property
    def labels(self) -> list[int]:
        return [label for _ in range(self.seeds) for label in range(self.classes)]

    @property
    def picture_seeds(self) -> list[int]:
        """A seed of its own for each picture."""
        return list(range(self.classes * self.seeds))


@dataclass
class Result:
    """What one variant's pictures came out as, and what it cost.

    Attributes:
        psnr_db: to the original's pictures of the same seeds, mean over pictures; None for the original.
        psnr_db_worst: the picture that is furthest off.
        ssim: structural similarity to the original's pictures.
        relative_l2: norm of the difference over the norm of the original's samples.
        accuracy: share of the pictures that the classifier gives their class.
        bits_per_weight: of the quantized layers, scales included; None for the original.
        quantized_bytes: stored bytes of the quantized layers' weights.
        model_bytes: of all parameters and buffers.
        seconds_per_step: one sampling step of the whole batch, guidance included, on this machine.
        backend: what computed the quantized layers.
    """

    name: str
    scheme: str | None
    rounding: str | None
    pictures: torch.Tensor
    psnr_db: float | None
    psnr_db_worst: float | None
    ssim: float | None
    relative_l2: float | None
    accuracy: float
    bits_per_weight: float | None
    quantized_bytes: int | None
    model_bytes: int
    seconds_per_step: float
    backend: str


def rows() -> list[Variant]:
    """The original, the original in bf16, every recommended scheme, and the 4-bit ones once more with compensated
    rounding.
    """
    return [variant for variant in variants(RECOMMENDED) if not variant.other_seeds]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _compare(samples: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    found = difference(samples, original)
    return dict(
        psnr_db=float(found.psnr_db.mean()),
        psnr_db_worst=float(found.psnr_db.min()),
        ssim=float(found.ssim.mean()),
        relative_l2=found.relative_l2,
    )


def calibrate_source(source: Source, settings: Settings) -> Calibration:
    """Ranges and second moments of a run that draws the classes in turn, by the defaults."""
    labels = [index % settings.classes for index in range(DEFAULT_PICTURES)]
    seeds = [10_000 + index for index in range(DEFAULT_PICTURES)]  # not the seeds that are compared

    def run() -> None:
        sample(
            source.transformer,
            source.scheduler,
            labels,
            seeds,
            steps=settings.steps,
            guidance=settings.guidance,
            progress=False,
        )

    return calibrate(source.transformer, run, moments=True)


def run_variant(
    variant: Variant, source: Source, calibration: Calibration, settings: Settings
) -> tuple[nn.Module, torch.Tensor, float]:
    """(model, samples, seconds per step) of one variant; ``source`` keeps its model. Where bf16 is emulated, a few of
    its steps are timed, and the pictures are drawn by the same products, made faster.
    """
    model = copy.deepcopy(source.transformer)
    nn.Module.to(
        model, dtype=variant.dtype
    )  # diffusers' own `to` warns of modules to keep in fp32, of which DiT has none
    if variant.scheme is not None:
        quantize(model, variant.scheme, calibration, rounding=variant.rounding, fused=True)
    if variant.dtype != torch.bfloat16 or not bf16.is_emulated(settings.device):
        return model, *_drawn(model, source, settings, settings.steps)
    _, seconds = _drawn(model, source, settings, min(EMULATED_STEPS, settings.steps))
    samples, _ = _drawn(bf16.rounding(model), source, settings, settings.steps)
    return model, samples, seconds


def _drawn(model: nn.Module, source: Source, settings: Settings, steps: int) -> tuple[torch.Tensor, float]:
    """(samples, seconds per step) of a run of ``steps``."""
    started = time.perf_counter()
    samples = sample(
        model,
        source.scheduler,
        settings.labels,
        settings.picture_seeds,
        steps=steps,
        guidance=settings.guidance,
    )
    return samples, (time.perf_counter() - started) / steps


def run_demo(settings: Settings, model_directory: Path = MODEL_DIRECTORY) -> tuple[list[Result], Calibration]:
    """Results of :func:`rows`, in their order, behind a progress bar; the first is the original."""
    source = load_source(model_directory, device=settings.device)
    source.transformer.float()
    classifier = load_classifier()
    labels = torch.tensor(settings.labels)
    calibration = calibrate_source(source, settings)
    results: list[Result] = []
    original = None
    bar = tqdm(rows(), desc="demo", unit="row")
    for variant in bar:
        bar.set_postfix_str(variant.name)
        model, samples, seconds = run_variant(variant, source, calibration, settings)
        original = samples if original is None else original
        layers = quantized_layers(model).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        stored = sum(layer.nbytes for layer in layers)
        same = variant == ORIGINAL
        comparison = (
            dict.fromkeys(("psnr_db", "psnr_db_worst", "ssim", "relative_l2")) if same else _compare(samples, original)
        )
        results.append(
            Result(
                name=variant.name,
                scheme=variant.scheme,
                rounding=variant.rounding if variant.scheme else None,
                pictures=to_unit_range(samples),
                accuracy=accuracy(classifier, samples, labels),
                bits_per_weight=8 * stored / weights if layers else None,
                quantized_bytes=stored if layers else None,
                model_bytes=stored_bytes(model),
                seconds_per_step=seconds,
                backend=selected_backend(torch.device(settings.device).type) if layers else "torch",
                **comparison,
            )
        )
    return results, calibration


def noise_floor(original: torch.Tensor, settings: Settings) -> float | None:
    """PSNR dB between the original's pictures of the same class and different seeds: what "another picture" means."""
    if settings.seeds < 2:
        return None
    by_seed = original.view(settings.seeds, settings.classes, *original.shape[1:])
    each = peak_signal_noise_ratio(
        by_seed[1:].flatten(0, 1), by_seed[:-1].flatten(0, 1), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return float(each.mean())
