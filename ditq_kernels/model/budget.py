"""Bits where they matter most: for each layer one of several schemes, so that the sum of the errors is least and the
weights fit a size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..layer.formats import SCHEMES, Scheme
from ..layer.linear import QuantLinear

WEIGHTS = ("w4_g128", "w4_g64", "w4_g32", "w8")  # what a budget chooses among


@dataclass(frozen=True)
class Option:
    """One thing to do with a layer: ``scheme``, which stores ``bits`` in all and makes ``error``."""

    scheme: str
    bits: int
    error: float


def alternatives(scheme: Scheme) -> list[str]:
    """Names of the schemes with the activations of ``scheme`` and each of :data:`WEIGHTS`."""
    wanted = [other for other in SCHEMES.values() if other.activation == scheme.activation]
    return [other.name for name in WEIGHTS for other in wanted if other.weight.name == name]


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """For each layer one of its options, their bits ``budget`` at most. Steps are taken in the order of error saved per
    bit, and those that do not fit left out: the sum of the errors is least among all combinations that are as small if
    every step fits, and close to it if one does not.

    Raises:
        ValueError: if even the smallest options exceed ``budget``.
    """
    steps = {name: _hull(of_layer) for name, of_layer in options.items()}
    chosen = {name: 0 for name in steps}
    spent = sum(of_layer[0].bits for of_layer in steps.values())
    if spent > budget:
        raise ValueError(f"the budget is below {spent} bits, which the smallest of the allowed schemes take")
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        if chosen[name] + 1 < len(steps[name]):
            here, there = steps[name][chosen[name] : chosen[name] + 2]
            heapq.heappush(queue, ((there.error - here.error) / (there.bits - here.bits), name))

    for name in steps:
        offer(name)
    while queue:
        _, name = heapq.heappop(queue)
        here, there = steps[name][chosen[name] : chosen[name] + 2]
        if spent + there.bits - here.bits <= budget:
            spent += there.bits - here.bits
            chosen[name] += 1
            offer(name)
    return {name: steps[name][index] for name, index in chosen.items()}


def _hull(options: Iterable[Option]) -> list[Option]:
    """The options on the lower convex hull of error over bits, by ascending bits: each saves less per bit than the one
    before, and none is both larger and worse.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (second.error - first.error) / (second.bits - first.bits)


@torch.no_grad()
def rounding_error(layer: nn.Linear, scheme: str | Scheme, moment: torch.Tensor | None = None) -> float:
    """Noise over signal, as powers, of the output of ``layer`` when its weight is rounded to nearest as in ``scheme``.

    Args:
        moment: [K, K], the sum of ``x x^T`` over the layer's inputs; None: white inputs, that is, the weight's own
            noise.
    """
    weight = layer.weight.detach().float()
    error = weight - QuantLinear.from_linear(layer, Scheme.parse(scheme).weight_only).dequantized_weight()
    if moment is None:
        return float(error.square().sum() / weight.square().sum().clamp(min=1e-30))
    moment = moment.to(weight)
    return float((error @ moment * error).sum() / (weight @ moment * weight).sum().clamp(min=1e-30))
