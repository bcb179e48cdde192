"""Experiment b''', the default of compensated rounding: second moments from one step and from several of one run, over
50 steps, on pictures that calibrate nothing; beside it, what a static scheme makes of the step that gives ranges.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...model.chosen_steps import StepChoice
from ...model.conversion import quantize, quantized_layers, replace_module
from ...model.planning import plan
from .calibration import SETS
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol(pictures=20, steps=50)
SCHEME = "w4a16_g64"
STATIC_SCHEME, STATIC_SETS = "w4a8_g128_static", 2
BEFORE = 0.6  # the one step of the default that was
# The first of several is the one that ranges are of.
CHOICES: tuple[StepChoice, ...] = (BEFORE, (0.4, 0.8), (0.6, 0.4, 0.8), (0.6, 0.3, 0.9), "all")
STATIC_CHOICES: tuple[StepChoice, ...] = (BEFORE, (0.4, 0.8), (0.6, 0.3, 0.9))


def decoded(model: nn.Module) -> nn.Module:
    """``model`` with plain layers of the weights that its quantized ones stand for: the same, and faster on a CPU."""
    for layer in quantized_layers(model).values():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(layer.dequantized_weight(), requires_grad=False), layer.bias
        replace_module(model, layer, plain)
    return model


def cases(lab: Lab) -> Iterator[Case]:
    """Compensated weights, alone or with static activations, from each choice of steps and three sets of pictures."""

    def case(scheme: str, step: StepChoice, which: int) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(step, moments=True, which=which)
            model = quantize(lab.copy(), scheme, calibration, rounding="compensated", progress=False)
            return model if scheme == STATIC_SCHEME else decoded(model)

        chosen = plan(lab.model, scheme).quantized()
        bits = sum(entry.stored_bits for entry in chosen) / sum(entry.weights for entry in chosen)
        at = list(step) if isinstance(step, tuple) else step  # as JSON has it
        return Case(dict(scheme=scheme, step=at, set=which, bits_per_weight=bits), build)

    for which in range(SETS):
        for step in CHOICES:
            yield case(SCHEME, step, which)
    for which in range(STATIC_SETS):
        for step in STATIC_CHOICES:
            yield case(STATIC_SCHEME, step, which)
