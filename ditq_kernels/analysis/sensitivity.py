"""What each layer costs when it alone is quantized: noise in its own output, and the change of the final picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..layer.formats import Scheme
from ..layer.linear import QuantLinear
from ..model.conversion import replace_module
from ..model.observation import linear_layers, observe_steps
from ..model.planning import obstacle_to, plan
from .weights import signal_to_noise

Forms = dict[str, dict[str, str]]  # by layer, by the scheme asked for: the scheme that the layer is tried in


@dataclass(frozen=True)
class Loss:
    """What one scheme does to one layer.

    Attributes:
        snr_db: signal-to-noise ratio of the layer's output over the observed step.
        picture_error: relative L2 distance of the run's result, the layer alone quantized, from the original's of the
            same seeds; infinite where that result is not finite; None where it was not drawn.
    """

    snr_db: float
    picture_error: float | None = None


Losses = dict[str, dict[str, Loss]]  # by layer, by the scheme asked for


@dataclass
class _Powers:
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)


class _OutputObserver:
    """Runs each layer beside its quantized forms, which exist for the time of one call."""

    def __init__(self, layers: Mapping[str, nn.Linear], forms: Forms, amax: Mapping[str, float]) -> None:
        self.layers, self.forms, self.amax = layers, forms, amax
        self.powers: dict[str, _Powers] = {}

    def begin(self, step: int, samples: int | None) -> None:
        pass

    def see(self, name: str, x: torch.Tensor) -> None:
        if name not in self.forms:
            return
        layer = self.layers[name]
        exact = F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
        powers = self.powers.setdefault(name, _Powers())
        powers.signal += float(exact.double().square().sum())
        for asked, scheme in self.forms[name].items():
            noise = (quantized_form(layer, scheme, self.amax.get(name))(x).float() - exact).double().square().sum()
            powers.noise[asked] = powers.noise.get(asked, 0.0) + float(noise)


def forms_of(model: nn.Module, schemes: Iterable[str], amax: Mapping[str, float]) -> Forms:
    """What each layer is tried in: the scheme that a plan gives it under each of ``schemes``; the scheme itself where
    the plan would keep it in 16 bits. What is impossible is left out: groups wider than the layer, and static scales
    without a calibrated reach.
    """
    layers = linear_layers(model)
    forms: Forms = {}
    for asked in schemes:
        for entry in plan(model, asked):
            scheme = Scheme.parse(entry.scheme or asked)
            narrow = scheme.weight.group is not None and scheme.weight.group > entry.in_features
            if obstacle_to(layers[entry.name]) or narrow or (scheme.static and not amax.get(entry.name)):
                continue
            forms.setdefault(entry.name, {})[asked] = scheme.name
    return forms


def quantized_form(layer: nn.Linear, name: str, amax: float | None) -> QuantLinear:
    """``layer`` in the scheme ``name``."""
    scheme = Scheme.parse(name)
    return QuantLinear.from_linear(layer, scheme, input_amax=amax if scheme.static else None)


def output_losses(
    model: nn.Module,
    run: Callable[[], Any],
    forms: Forms,
    amax: Mapping[str, float],
    step: int,
    calls_per_step: int | None = None,
) -> Losses:
    """Losses from the layers' inputs in one step of ``run()``.

    Args:
        amax: calibrated reach by layer, for static schemes.
    """
    observer = _OutputObserver(linear_layers(model), forms, amax)
    observe_steps(model, run, [step], observer, calls_per_step)
    return {
        name: {scheme: Loss(signal_to_noise(powers.signal, noise)) for scheme, noise in powers.noise.items()}
        for name, powers in observer.powers.items()
    }


def relative_error(changed: torch.Tensor, original: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``original``; infinite if ``changed`` is not finite."""
    if not bool(torch.isfinite(changed).all()):
        return math.inf
    return float((changed.double() - original.double()).norm() / original.double().norm())


def draw_losses(
    model: nn.Module,
    draw: Callable[[], torch.Tensor],
    losses: Losses,
    forms: Forms,
    amax: Mapping[str, float],
    progress: bool = True,
) -> Losses:
    """``losses`` with the picture's error, each layer alone quantized. ``draw()`` is one whole run that returns what it
    sampled, the same at every call. The model is left as it was.
    """
    from tqdm import tqdm

    original = draw()
    if not bool(torch.isfinite(original).all()):
        raise ValueError("the model's own result holds NaN or infinite values; analyze in a wider dtype")
    drawn: Losses = {}
    jobs = [(name, scheme) for name, of_layer in losses.items() for scheme in of_layer]
    for name, asked in tqdm(jobs, desc="one by one", unit="run", file=sys.stderr, leave=False, disable=not progress):
        layer = model.get_submodule(name)
        quantized = quantized_form(layer, forms[name][asked], amax.get(name))
        replace_module(model, layer, quantized)
        try:
            error = relative_error(draw(), original)
        finally:
            replace_module(model, quantized, layer)
        drawn.setdefault(name, {})[asked] = Loss(losses[name][asked].snr_db, error)
    return drawn


def squared_errors(losses: Losses, forms: Forms) -> dict[str, dict[str, float]]:
    """By layer and the scheme that it was tried in: the squared error of the pictures, the layer alone quantized. What
    ``ditq.plan(model, budget_bits=..., errors=...)`` takes.
    """
    return {
        name: {
            forms[name][asked]: loss.picture_error**2
            for asked, loss in of_layer.items()
            if loss.picture_error is not None
        }
        for name, of_layer in losses.items()
    }
