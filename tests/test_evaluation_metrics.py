"""Metrics against closed forms."""

import math

import pytest
import torch

from ditq_kernels.demo.classifier import accuracy
from ditq_kernels.evaluation.metrics import (
    Difference,
    classifier_score,
    difference,
    features_of,
    frechet_distance,
    frechet_excess,
    interval,
    mean_distance,
    variation,
)


def test_a_known_difference():
    original = torch.zeros(3, 1, 16, 16)
    original[:, :, :8] = 0.5
    pictures = original.clone()
    pictures[1] += 0.2  # 0.1 in the unit range
    found = difference(pictures, original)
    assert found.psnr_db.isinf().tolist() == [True, False, True]
    assert float(found.psnr_db[1]) == pytest.approx(20.0, abs=1e-3)
    assert found.ssim.shape == (3,) and float(found.ssim[0]) == pytest.approx(1.0) and float(found.ssim[1]) < 1.0
    assert found.relative_l2 == pytest.approx(0.2 * 16 / (0.5 * math.sqrt(3 * 128)))
    together = Difference.of_batches(zip(pictures.split(2), original.split(2), strict=True))
    assert torch.equal(together.ssim, found.ssim) and together.relative_l2 == pytest.approx(found.relative_l2)


def test_total_variation_of_stripes():
    stripes = torch.full((2, 1, 4, 6), -1.0)
    stripes[..., ::2] = 1.0
    assert variation([stripes, stripes[:1]]) == pytest.approx(4 * 5) and variation([torch.zeros(1, 1, 4, 4)]) == 0


@pytest.mark.parametrize(
    ("pictures", "original", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8), "must match"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8), "be some"),
        (torch.full((1, 1, 8, 8), torch.nan), torch.zeros(1, 1, 8, 8), "NaN"),
    ],
)
def test_what_cannot_be_compared(pictures, original, message):
    with pytest.raises(ValueError, match=message):
        difference(pictures, original)


def test_the_frechet_distance_of_gaussians():
    """Diagonal covariances: |difference of means|^2 + sum (s - t)^2, of the samples' own moments."""
    torch.manual_seed(0)
    # The features are the pixels; whitened, so that the samples' moments are exact.
    base = torch.randn(700, 4, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(base.T.cov())).T
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.0, 1.0, -1.0, 0.5])
    features = base * scale + shift
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    found = frechet_distance(features, base)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(base, base) < 1e-9
    assert mean_distance(features, base) == pytest.approx(float(shift.square().sum()))
    with pytest.raises(ValueError, match="4 pictures are too few for the covariance of 4 features"):
        frechet_distance(features[:4], features)


def test_the_excess_of_a_distance():
    torch.manual_seed(0)
    original, reference = torch.randn(400, 3, dtype=torch.float64), torch.randn(500, 3, dtype=torch.float64)
    excess, (low, high) = frechet_excess(original + 0.5, original, reference, resamples=50)
    assert low < excess < high and low > 0 and excess == pytest.approx(3 * 0.25, abs=0.4)
    excess, (low, high) = frechet_excess(original, original, reference, resamples=10)
    assert (excess, low, high) == (0, 0, 0)


def test_features_come_in_batches():
    pictures = torch.rand(1203, 1, 2, 2)
    sizes = []
    found = features_of(pictures.split(500), lambda x: sizes.append(len(x)) or x.flatten(1))
    assert torch.equal(found, pictures.flatten(1).double()) and max(sizes) == 500


def test_scores_of_certain_and_of_clueless_classifiers():
    certain, clueless = torch.eye(5).repeat(4, 1), torch.full((20, 5), 0.2)
    assert classifier_score(certain.split(7)) == pytest.approx(5.0)
    assert classifier_score([clueless]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs pictures"):
        classifier_score([])


def test_an_interval_holds_the_mean_about_as_often_as_it_says(monkeypatch):
    torch.manual_seed(0)
    hits = 0
    for _ in range(100):
        low, high = interval(torch.randn(60) + 3, resamples=400)
        hits += low <= 3 <= high
    assert 85 <= hits <= 100
    whole = interval(torch.arange(10.0))
    assert whole == interval(torch.arange(10.0))
    uneven = torch.linspace(0, 1, 37).exp()
    assert interval(uneven) == interval(uneven, resamples=2000, level=0.95, seed=0)
    assert interval(uneven) not in (interval(uneven, resamples=1999), interval(uneven, seed=1))
    monkeypatch.setattr("ditq_kernels.evaluation.metrics.MOST_PICKED", 70)
    assert whole == interval(torch.arange(10.0))  # a few resamples at a time are the same resamples
    with pytest.raises(ValueError, match="at least two"):
        interval(torch.ones(1))


def test_a_distance_waits_for_no_other_process(monkeypatch):
    """The other processes of an evaluation are gone when the first one judges."""

    def absent(*_, **__):
        raise RuntimeError("nobody there")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name in ("barrier", "all_gather", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, absent)
    features = torch.randn(20, 3, dtype=torch.float64)
    assert frechet_distance(features, features) < 1e-9


def test_intervals_are_as_wide_as_95_percent_ask_for(monkeypatch):
    """Of many values the mean is normal: 1.96 of its deviations on either side."""
    values = torch.randn(500, generator=torch.Generator().manual_seed(3)).double()
    deviation = float(values.std()) / 500**0.5
    low, high = interval(values)
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.06)
    # 90 % would ask for 0.84 of it, and 99.5 % for 1.43.
    monkeypatch.setattr("ditq_kernels.evaluation.metrics.frechet_distance", lambda x, _: float(x.mean()))
    excess, (low, high) = frechet_excess(values.unsqueeze(1), torch.zeros(500, 1), torch.zeros(9, 1), resamples=2000)
    assert excess == pytest.approx(float(values.mean()))
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.06)


def test_a_relative_difference_of_known_pictures():
    original = torch.ones(2, 1, 16, 16)
    assert difference(original * 0.9, original).relative_l2 == pytest.approx(0.1, rel=1e-5)


def test_the_share_of_pictures_that_a_classifier_knows():
    pictures = torch.arange(1203.0).view(-1, 1, 1, 1)
    labels = torch.zeros(1203, dtype=torch.int64)
    labels[:401] = 1  # it says so of every picture

    def classifier(batch):
        assert len(batch) <= 500
        return torch.tensor([0.0, 2.0, 1.0]).expand(len(batch), 3)

    assert accuracy(classifier, pictures, labels) == pytest.approx(401 / 1203)
