"""Differences between pictures of the same seeds, and between distributions of pictures. No number here is an FID: the
features are those of a classifier that the caller gives, and the names say so.

torchmetrics computes what it knows; pictures are fp32 [B, C, H, W] in [-1, 1] throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..integrations.pictures import to_unit_range

MOST_PICKED = 1 << 22  # values that a bootstrap holds at once


@dataclass(frozen=True)
class Difference:
    """Between pictures and the original's of the same seeds, in order.

    Attributes:
        psnr_db: of each picture, [0, 1] range; infinite where nothing differs.
        ssim: structural similarity of each picture.
        signal, noise: sums of squares of the original and of the difference.
    """

    psnr_db: torch.Tensor
    ssim: torch.Tensor
    signal: float
    noise: float

    @property
    def relative_l2(self) -> float:
        """Norm of the difference over that of the original, all pictures together."""
        return math.sqrt(self.noise / self.signal)

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Difference:
        """Of pictures and originals that come in batches; ValueError as :func:`difference`."""
        found = [difference(pictures, original) for pictures, original in batches]
        return cls(
            torch.cat([batch.psnr_db for batch in found]),
            torch.cat([batch.ssim for batch in found]),
            sum(batch.signal for batch in found),
            sum(batch.noise for batch in found),
        )


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
        float(original.double().square().sum()),
        float((pictures.double() - original.double()).square().sum()),
    )


def variation(batches: Iterable[torch.Tensor]) -> float:
    """Total variation of a picture, mean over those of all ``batches``: the sum of the absolute differences of
    neighbouring pixels, [0, 1] range.
    """
    from torchmetrics.functional.image import total_variation

    of_each = [total_variation(to_unit_range(batch).double(), reduction="none") for batch in batches]
    return float(torch.cat(of_each).mean())


def features_of(batches: Iterable[torch.Tensor], features: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """fp64 [N, D]: ``features`` of the pictures of all ``batches``."""
    with torch.no_grad():
        return torch.cat([features(batch).double() for batch in batches])


class _Identity(nn.Module):
    """torchmetrics takes a module for the features; these are there already."""

    num_features = 1

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance (Dowson and Landau, 1982) between Gaussians fitted to two sets of features, [N, D] and [M, D].

    Raises:
        ValueError: if a set has no more members than there are features: its covariance would be singular.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    for which, found in (("pictures", features), ("reference pictures", reference)):
        count = found.shape[1]
        if len(found) <= count:
            raise ValueError(
                f"{len(found)} {which} are too few for the covariance of {count} features; draw at least {count + 1}, "
                "better ten times as many"
            )
    identity = _Identity()
    identity.num_features = features.shape[1]
    metric = FrechetInceptionDistance(identity, normalize=True, sync_on_compute=False).set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return float(metric.compute())


def mean_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Squared distance of the means of [N, D] and [M, D]: one of the two terms of the Fréchet distance; the rest is the
    covariances'.
    """
    return float((features.mean(0) - reference.mean(0)).square().sum())


def frechet_excess(
    features: torch.Tensor, original: torch.Tensor, reference: torch.Tensor, resamples: int = 200, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """By how much ``features`` [N, D] are further from ``reference`` [M, D] than ``original`` [N, D], of the same
    seeds, is; with a 95 % bootstrap interval, for which seeds are drawn again with all that belongs to them.
    """
    generator = torch.Generator().manual_seed(seed)
    found = frechet_distance(features, reference) - frechet_distance(original, reference)
    drawn = []
    for _ in range(resamples):
        same = torch.randint(len(features), (len(features),), generator=generator)
        other = reference[torch.randint(len(reference), (len(reference),), generator=generator)]
        drawn.append(frechet_distance(features[same], other) - frechet_distance(original[same], other))
    low, high = torch.quantile(torch.tensor(drawn), torch.tensor([0.025, 0.975])).tolist()
    return found, (low, high)


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
    values, at_once = values.double(), max(1, MOST_PICKED // len(values))
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(at_once, resamples - done), len(values)), generator=generator)].mean(
                1
            )
            for done in range(0, resamples, at_once)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
