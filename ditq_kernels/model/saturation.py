"""Whether static schemes meet what they were not calibrated for: inputs beyond the calibrated range, which saturate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..layer.linear import QuantLinear
from .calibration import check_numbers, check_request
from .chosen_steps import ALL_STEPS, StepChoice, choose_steps, observe_chosen
from .conversion import quantized_layers
from .wrappers import own_name

# On the embedded model in w8a8_static, calibrated from one step, whole runs with other seeds, classes or guidance have
# 0.03 to 0.08 % in the worst layer, since other steps reach a little further; where it is 0.12 % (ranges at the 99.99th
# percentile), the pictures lose 4 dB.
DEFAULT_SHARE = 0.001
PRINTED = 10  # layers of a table


class SaturationWarning(UserWarning):
    """Layers of a static scheme were fed more values beyond their calibrated range than was allowed."""


@dataclass(eq=False)
class Saturation:
    """How a run's inputs fit the calibrated ranges of a model's static layers.

    Attributes:
        share: of each layer's input values, in [0, 1], those whose magnitude is beyond the layer's calibrated amax.
        overshoot: of each layer, its largest input magnitude over that amax; below 1 there was room left. Not finite
            where the inputs were not.
        not_called: static layers that the run did not feed anything.
    """

    share: dict[str, float] = field(default_factory=dict)
    overshoot: dict[str, float] = field(default_factory=dict)
    not_called: list[str] = field(default_factory=list)

    def above(self, share: float) -> list[str]:
        """The layers with more than ``share``, the worst first."""
        return [name for name in self.worst() if self.share[name] > share]

    def worst(self) -> list[str]:
        """All layers that were called, the largest share first."""
        return sorted(self.share, key=lambda name: (-self.share[name], -self.overshoot[name]))

    def table(self, count: int | None = PRINTED) -> str:
        """The ``count`` worst layers as an aligned table, None for all, and what was not called."""
        shown = self.worst()[:count]
        rows = [("layer", "beyond range", "largest / range")]
        rows += [(name, f"{self.share[name]:.3%}", f"{self.overshoot[name]:.2f}") for name in shown]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([name.ljust(widths[0]), share.rjust(widths[1]), largest.rjust(widths[2])])
            for name, share, largest in rows
        ]
        if len(shown) < len(self.share):
            lines.append(f"and {len(self.share) - len(shown)} more layers, none of them worse")
        if self.not_called:
            lines.append("not called: " + ", ".join(self.not_called))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


class _Counter:
    """Counts on the device, so that a run does not wait for its own numbers."""

    def __init__(self, layers: Mapping[str, QuantLinear]) -> None:
        self.layers = layers
        self.values: dict[str, int] = {}
        self.beyond: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}

    def begin(self, step: int, samples: int | None) -> None:
        """Nothing depends on it."""

    def see(self, name: str, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        magnitudes = x.abs()
        beyond = (magnitudes > self.layers[name].input_amax.to(x.device)).sum()
        largest = magnitudes.amax().to(torch.float32)
        if name in self.values:
            # A model spread over devices may be moved between two calls, as by offloading.
            beyond += self.beyond[name].to(x.device)
            largest = torch.maximum(largest, self.largest[name].to(x.device))
        self.values[name] = self.values.get(name, 0) + x.numel()
        self.beyond[name], self.largest[name] = beyond, largest

    def result(self) -> Saturation:
        return Saturation(
            {name: int(self.beyond[name]) / count for name, count in self.values.items()},
            {name: float(self.largest[name]) / float(self.layers[name].input_amax) for name in self.values},
            [name for name in self.layers if name not in self.values],
        )


def saturation(
    model: nn.Module,
    run: Callable[[], Any],
    step: StepChoice = ALL_STEPS,
    *,
    warn_above: float = DEFAULT_SHARE,
    calls_per_step: int | None = None,
) -> Saturation:
    """How much of what ``run()`` feeds the static layers of ``model`` is beyond their calibrated ranges.

    Static schemes quantize activations with the range that one calibration saw; with another prompt or resolution,
    inputs may lie beyond it, and are cut off there. It costs a comparison and a maximum per layer and call, and only
    during this run; nothing waits for the device before its end.

    Args:
        model: quantized; it is left as it was. Of a pipeline, its transformer.
        run: does one sampling run, of any pipeline or sampler that calls ``model``.
        step: "all", or one step or several as :func:`calibrate` takes them.
        warn_above: the share of a layer's inputs above which it is warned of; None: never. On the inputs that were
            calibrated on the share is 0 by construction (or what a percentile left out), and nearly so in that step of
            the quantized model, whose layers are fed what quantized ones before them computed. 0.1 % is above what
            other steps and seeds bring along, and below what was seen to cost pictures.
        calls_per_step: as of :func:`calibrate`.

    Raises:
        TypeError: if ``model`` is no module, ``run`` not callable, or ``step`` no number.
        ValueError: for a model without static layers, or one whose ranges are offloaded to the meta device; a run that
            does not call the model; a step beyond the run, and numbers out of range.

    Warns:
        SaturationWarning: if a layer's share is above ``warn_above``.
    """
    check_request(model, run)
    check_numbers(step, None, calls_per_step)
    if warn_above is not None and not (isinstance(warn_above, Real) and 0 <= warn_above <= 1):
        raise ValueError(f"warn_above must be a share in [0, 1], or None, got {warn_above!r}")
    layers = {own_name(name): layer for name, layer in quantized_layers(model).items() if layer.scheme.static}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with a calibrated range that inputs could exceed; quantize to a "
            "static scheme such as w8a8_static first (other schemes find their ranges at run time)"
        )
    for name, layer in layers.items():
        if layer.input_amax.is_meta:
            raise ValueError(f"the range of {name} is on the meta device; load the model, or end its offloading, first")
    counter = _Counter(layers)
    # A whole run needs no account of its steps, for which the model's times would be waited for.
    chosen = choose_steps(model, run, step, calls_per_step)
    observe_chosen(model, run, chosen, counter, 1 if chosen.indices is None else calls_per_step, layers)
    found = counter.result()
    if warn_above is not None and (above := found.above(warn_above)):
        worst = above[0]
        warnings.warn(
            f"{len(above)} of {len(layers)} static layers were fed more than {warn_above:.3g} of their values beyond "
            f"the calibrated range, which saturate; the worst is {worst} with {found.share[worst]:.2%}, up to "
            f"{found.overshoot[worst]:.2f} times its range. Calibrate on a run like this one, or quantize to "
            f"{layers[worst].scheme.name.removesuffix('_static')}, which finds its ranges at run time",
            SaturationWarning,
            stacklevel=2,
        )
    return found
