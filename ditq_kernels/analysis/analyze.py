"""The whole analysis of one model: observed activations, weights, what each layer loses, and the plan that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..layer.formats import Scheme
from ..model.calibration import DEFAULT_STEP
from ..model.chosen_steps import step_index
from ..model.planning import Plan, plan
from .observe import Observation, observe_run
from .sensitivity import Forms, Losses, draw_losses, forms_of, output_losses, squared_errors
from .weights import WeightStatistics, all_weights

DEFAULT_SCHEMES = ("w8a8", "w8a8_static", "w4a8_g128")
# A layer is an exception if it makes so many times the squared error of the mean layer, and of its share in weights.
TIMES_THE_SHARE = 2.0


@dataclass
class Analysis:
    """Attributes:
    model: name of the model's class.
    observation: what its layers are fed over one run.
    weights: by linear layer.
    step: the step whose ranges static schemes take, and on which the outputs' noise was measured.
    schemes: the schemes tried.
    losses: by layer and scheme; forms: the scheme that the layer was tried in for it.
    plan: the recommended one, for the last of ``schemes``.
    exceptions: layers that it treats better than the recipe does.
    """

    model: str
    observation: Observation
    weights: dict[str, WeightStatistics]
    step: int
    schemes: tuple[str, ...]
    losses: Losses
    forms: Forms
    plan: Plan
    exceptions: tuple[str, ...] = ()

    def errors(self) -> dict[str, dict[str, float]]:
        """Squared errors of the pictures, by layer and the scheme that it was tried in:
        ``ditq.plan(model, scheme, budget_bits=..., errors=...)`` takes them, if the schemes tried were
        :func:`ditq_kernels.model.budget.alternatives` of its scheme.
        """
        return squared_errors(self.losses, self.forms)


def analyze(
    model: nn.Module,
    draw: Callable[[], torch.Tensor],
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    *,
    step: float = DEFAULT_STEP,
    calls_per_step: int | None = None,
    trial: Callable[[], torch.Tensor] | None = None,
    one_by_one: bool = True,
    progress: bool = True,
) -> Analysis:
    """Analyze ``model``, which is left as it was.

    Args:
        draw: does one whole sampling run with ``model`` and returns what it sampled, the same at every call.
        schemes: names of schemes to try each layer in; the plan is made for the last.
        step: position in the run, from 0 to 1, whose ranges static schemes take.
        calls_per_step: calls of ``model`` in one step; None: calls in a row at the same time are one.
        trial: a shorter run, to be repeated for each layer and scheme, that layer alone quantized; None: ``draw``.
        one_by_one: whether to do so at all. Without it the plan has no exceptions.

    Raises:
        ValueError: as :func:`.observe.observe_run` does, for an unknown scheme, no scheme, or a step outside 0 .. 1.
    """
    names = tuple(Scheme.parse(name).name for name in schemes)
    if not names:
        raise ValueError("at least one scheme is needed to analyze a model for")
    if not 0 <= step <= 1:
        raise ValueError(f"step must lie in [0, 1], got {step}")
    weights = all_weights(model)
    observation = observe_run(model, draw, calls_per_step, progress)
    index = step_index(float(step), observation.steps)
    amax = {name: seen.amax[index] for name, seen in observation.inputs.items() if index < len(seen.amax)}
    forms = {name: of_layer for name, of_layer in forms_of(model, names, amax).items() if name in weights}
    losses = output_losses(model, draw, forms, amax, index, calls_per_step)
    if one_by_one:
        losses = draw_losses(model, trial or draw, losses, forms, amax, progress)
    recommended, exceptions = recommended_plan(model, names[-1], losses, forms)
    return Analysis(type(model).__name__, observation, weights, index, names, losses, forms, recommended, exceptions)


def gentler(scheme: str) -> str | None:
    """The next scheme that costs a layer more bits and loses less: 8 bits for 4, then 16-bit activations, then None,
    16 bits throughout.
    """
    parsed = Scheme.parse(scheme)
    activations = "a16" if parsed.activation.bits == 16 else "a8"
    if parsed.weight.bits == 4:
        return "w8a16_g128" if activations == "a16" else f"w8a8{'_static' if parsed.static else ''}"
    return "w8a16_g128" if activations == "a8" else None


def recommended_plan(model: nn.Module, scheme: str, losses: Losses, forms: Forms) -> tuple[Plan, tuple[str, ...]]:
    """The plan for ``scheme``, with exceptions for layers that hold much of the pictures' squared error in few weights,
    and the names of those. Each exception's reason says how much.
    """
    chosen, exceptions = plan(model, scheme), []
    squared = {
        entry.name: losses[entry.name][scheme].picture_error ** 2
        for entry in chosen.quantized()
        if losses.get(entry.name, {}).get(scheme) and losses[entry.name][scheme].picture_error is not None
    }
    total = sum(value for value in squared.values() if math.isfinite(value))
    weights = sum(entry.weights for entry in chosen.quantized())
    for name in sorted(squared, key=squared.get, reverse=True):
        share, of_weights = squared[name] / max(total, 1e-300), chosen[name].weights / weights
        spoils = math.isinf(squared[name])
        if not spoils and share < TIMES_THE_SHARE * max(of_weights, 1 / len(squared)):
            continue
        better = gentler(forms[name][scheme])
        if better and chosen[name].in_features < (Scheme.parse(better).weight.group or 0):
            better = None
        reason = (
            "alone it makes the pictures NaN or infinite"
            if spoils
            else f"alone it makes {share:.0%} of the pictures' squared error, with {of_weights:.1%} of the weights"
        )
        chosen.set(name, better, reason)
        exceptions.append(name)
    return chosen, tuple(exceptions)
