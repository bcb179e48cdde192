"""Experiment c: whole schemes, static and dynamic, at few and many sampling steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ...evaluation.run import OTHER_SEEDS
from ...evaluation.variants import NOISE_FLOOR, ORIGINAL, Variant, variants
from ...integrations.sampling import save_grid
from ...layer.formats import RECOMMENDED
from ...model.calibration import DEFAULT_STEP
from ...model.conversion import quantize
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol(20)
PROTOCOLS = (Protocol(20, 10), Protocol(20, 50), Protocol(20, 250))
SHOWN = Protocol(10, 50)
ENLARGED = 2


def build(lab: Lab, variant: Variant, steps: int) -> nn.Module:
    """The model that ``variant`` says; calibrated on a run of ``steps``."""
    model = lab.copy()
    nn.Module.to(model, dtype=variant.dtype)
    if variant.scheme is not None:
        calibration = lab.calibration(DEFAULT_STEP, moments=True, steps=steps) if variant.calibrated else None
        quantize(model, variant.scheme, calibration, rounding=variant.rounding, progress=False)
    return model


def cases(lab: Lab) -> Iterator[Case]:
    """The noise floor and every recommended scheme, at each number of steps."""
    for protocol in PROTOCOLS:
        for variant in variants(RECOMMENDED):
            if variant == ORIGINAL:
                continue
            yield Case(
                dict(variant=variant.name, steps=protocol.steps),
                lambda variant=variant, protocol=protocol: build(lab, variant, protocol.steps),
                noise=False,
                protocol=protocol,
                first_seed=OTHER_SEEDS if variant.other_seeds else 0,
            )


def shown() -> list[Variant]:
    """What the grid of pictures has a row of: all but the other seeds."""
    return [variant for variant in variants(RECOMMENDED) if variant != NOISE_FLOOR[0]]


def draw_pictures(lab: Lab, path: Path) -> None:
    """Write a grid of pictures."""
    rows = [lab.draw(build(lab, variant, SHOWN.steps), SHOWN) for variant in shown()]
    enlarged = nn.functional.interpolate(torch.cat(rows), scale_factor=ENLARGED, mode="nearest")
    save_grid(enlarged, SHOWN.pictures, path)
