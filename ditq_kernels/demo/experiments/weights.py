"""Experiment b: how many bits weights need, in which groups, where their levels lie, and how they are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from torch import nn

from .lab import Case, Lab, Protocol
from .simulated import WeightRounding

PROTOCOL = Protocol(calibration_pictures=10)
GROUPS = (None, 128, 64, 32)
RULES = ("symmetric", "eighth_level", "free", "best")
PLAIN = "eighth_level"  # the rule where rules are not what is asked about


def roundings() -> list[WeightRounding]:
    """Every combination that is asked about, each once."""
    wanted = [WeightRounding(8, group, "symmetric") for group in GROUPS]
    for group in GROUPS:
        for bits in (6, 4, 3):
            plain = WeightRounding(bits, group, PLAIN)
            wanted += [plain, replace(plain, compensated=True)]
        two_level = WeightRounding(4, group, PLAIN, two_level=True)
        for rule in RULES:
            wanted += [replace(two_level, zero_point=rule), replace(two_level, zero_point=rule, compensated=True)]
        wanted += [replace(two_level, clip="search"), replace(two_level, clip="search", compensated=True)]
    for rule in RULES:
        wanted += [WeightRounding(bits, 128, rule) for bits in (4, 3)]
    wanted += [WeightRounding(4, 128, PLAIN, two_level, clip) for two_level, clip in ((False, "search"), (True, 0.9))]
    for clip in (None, "search"):
        restored = WeightRounding(4, 128, PLAIN, True, clip, gain_restored=True)
        wanted += [restored, replace(restored, compensated=True)]
    return list(dict.fromkeys(wanted))


def cases(lab: Lab) -> Iterator[Case]:
    """Weights alone; activations stay in floating point."""
    shapes = [(layer.out_features, layer.in_features) for layer in lab.layers.values()]
    total = sum(n * k for n, k in shapes)

    def case(rounding: WeightRounding) -> Case:
        def build() -> nn.Module:
            moments = (
                lab.calibration(0.5, moments=True).moments if rounding.compensated or rounding.gain_restored else {}
            )
            return lab.with_weights(lambda name, weight: rounding.apply(weight, moments.get(name)))

        bits = sum(rounding.bits_per_weight(n, k) * n * k for n, k in shapes) / total
        return Case({**asdict(rounding), "bits_per_weight": bits}, build)

    yield from map(case, roundings())
