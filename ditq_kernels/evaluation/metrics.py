"""Differences between pictures of the same seeds, and between distributions of pictures. No number here is an FID: the
features are those of a classifier that the caller gives, and the names say so.

torchmetrics computes what it knows; pictures are fp32 [B, C, H, W] in [-1, 1] throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

BATCH = 500  # pictures that a classifier sees at once


@dataclass(frozen=True)
class Difference:
    """Between pictures and the original's of the same seeds, in order.

    Attributes:
        psnr_db: of each picture, [0, 1] range; infinite where nothing differs.
        ssim: structural similarity of each picture.
        relative_l2: norm of the difference over that of the original, all pictures together.
    """

    psnr_db: torch.Tensor
    ssim: torch.Tensor
    relative_l2: float


def to_unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] to [0, 1], clamped."""
    return (pictures / 2 + 0.5).clamp(0, 1)


def difference(pictures: torch.Tensor, original: torch.Tensor) -> Difference:
    """What became of ``original``.

    Raises:
        ValueError: for other shapes, no picture, or values that are not finite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if pictures.shape != original.shape or not len(pictures):
        shapes = f"pictures {list(pictures.shape)} and originals {list(original.shape)}"
        raise ValueError(f"{shapes} must match, and be some")
    if not bool(torch.isfinite(pictures).all()):
        raise ValueError("the pictures hold NaN or infinite values")
    shown, reference = to_unit_range(pictures), to_unit_range(original)
    return Difference(
        peak_signal_noise_ratio(shown, reference, data_range=1.0, dim=(1, 2, 3), reduction="none"),
        structural_similarity_index_measure(shown, reference, data_range=1.0, reduction="none"),
        float((pictures.double() - original.double()).norm() / original.double().norm()),
    )


class _Features(nn.Module):
    """A feature function as torchmetrics wants it."""

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], num_features: int) -> None:
        super().__init__()
        self.features, self.num_features = features, num_features

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.features(pictures)


def frechet_distance(
    pictures: torch.Tensor,
    reference: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
    num_features: int,
) -> float:
    """Fréchet distance (Dowson and Landau, 1982) between Gaussians fitted to the features of two sets of pictures; the
    sets may differ in size.

    Args:
        features: pictures to [B, num_features].

    Raises:
        ValueError: if a set has no more pictures than there are features: its covariance would be singular.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    for which, found in (("pictures", pictures), ("reference pictures", reference)):
        if len(found) <= num_features:
            raise ValueError(
                f"{len(found)} {which} are too few for the covariance of {num_features} features; draw at least "
                f"{num_features + 1}, better ten times as many"
            )
    metric = FrechetInceptionDistance(_Features(features, num_features), normalize=True).set_dtype(torch.float64)
    for found, real in ((reference, True), (pictures, False)):
        for batch in found.split(BATCH):
            metric.update(batch, real=real)
    return float(metric.compute())


def classifier_score(probabilities: Iterable[torch.Tensor]) -> float:
    """``exp(mean KL(p(class | picture) || p(class)))`` over batches [B, classes] of a classifier's probabilities: the
    formula of the inception score (Salimans et al., arXiv 1606.03498) with another classifier. From 1 to the number of
    classes.

    Raises:
        ValueError: without pictures.
    """
    every = torch.cat([batch.double() for batch in probabilities] or [torch.empty(0, 1)])
    if not len(every):
        raise ValueError("a score needs pictures")
    marginal = every.mean(0, keepdim=True)
    divergence = torch.xlogy(every, every / marginal).sum(1)
    return float(divergence.mean().exp())


def interval(values: torch.Tensor, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [n] (Efron, 1979); the same at every call.

    Raises:
        ValueError: for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double()[picked].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
