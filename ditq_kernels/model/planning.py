"""Plans: what becomes of each linear layer of a model, and why. A plan is a value; nothing here touches a weight."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layer.formats import Scheme
from ..layer.stored_part import StoredPart
from .budget import Option, allocate, alternatives, rounding_error
from .observation import linear_layers
from .plan_entry import PlanEntry
from .plan_table import plan_table
from .recipes import recipe_for
from .wrappers import adapters_modules, bare, own_name

if TYPE_CHECKING:
    from .calibration import Calibration

BY_HAND = "set by hand"


class Plan:
    """Which scheme each linear layer of a model gets; print it, edit it, store it.

    ``plan[name]`` is a :class:`PlanEntry`; ``plan[name] = "w8a8"`` or ``= None`` changes one layer, :meth:`set` those
    that a pattern matches.
    """

    def __init__(self, model: str, scheme: str, entries: Iterable[PlanEntry], other_parameters: int = 0) -> None:
        self.model = model
        self.scheme = scheme
        self.other_parameters = other_parameters  # of the model, in no entry: convolutions, embeddings, norms, biases
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # a plan can be edited

    def __getitem__(self, name: str) -> PlanEntry:
        """Raises KeyError with the nearest names if the plan has no such layer."""
        if name not in self._entries:
            raise KeyError(f"the plan has no layer {name!r}{self._nearest(name)}")
        return self._entries[name]

    def __setitem__(self, name: str, scheme: str | Scheme | None) -> None:
        """Raises as :meth:`set` does, and KeyError with the nearest names if the plan has no such layer."""
        self._change([self[name]], scheme, BY_HAND)

    def set(self, pattern: str, scheme: str | Scheme | None, reason: str = BY_HAND) -> int:
        """Give ``scheme`` (None: keep in 16 bits) to every layer whose name matches the fnmatch ``pattern``; how many.

        Raises:
            ValueError: if nothing matches (with the nearest names), or the scheme is unknown or impossible for one of
                the layers; nothing is changed then.
        """
        matched = [entry for entry in self if fnmatchcase(entry.name, pattern)]
        if not matched:
            raise ValueError(f"no layer of the plan matches {pattern!r}{self._nearest(pattern)}")
        self._change(matched, scheme, reason)
        return len(matched)

    def quantized(self) -> list[PlanEntry]:
        """The entries that have a scheme."""
        return [entry for entry in self if entry.scheme is not None]

    def _change(self, entries: list[PlanEntry], scheme: str | Scheme | None, reason: str) -> None:
        parsed = None if scheme is None else Scheme.parse_for_layer(scheme)
        for entry in entries:
            if parsed is not None and entry.fixed:
                raise ValueError(f"{entry.name} cannot be quantized: {entry.reason}")
            if parsed is not None and _too_narrow(entry.in_features, parsed):
                raise ValueError(f"{entry.name} cannot take {parsed}: {_narrow_reason(entry.in_features, parsed)}")
        for entry in entries:
            changed = entry if parsed is None and entry.fixed else replace(entry, scheme=_name(parsed), reason=reason)
            self._entries[entry.name] = changed

    def _nearest(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.3)
        return f"; nearest: {', '.join(nearest)}" if nearest else ""

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Plan {self.scheme} for {self.model}: {len(self.quantized())} of {len(self)} linear layers quantized>"

    def table(self, every_layer: bool = False) -> str:
        """The plan as text, the total last; like layers in one line (``blocks.{0-27}.to_q``) unless ``every_layer``."""
        lines = plan_table(list(self), every_layer)
        return "\n".join([f"{self.model}, {self.scheme}", *lines, self.summary()])

    def summary(self) -> str:
        """One line: layers, the share of the model's parameters that is quantized, bits per weight over all linear
        layers, and what stays in 16 bits.
        """
        weights = sum(entry.weights for entry in self)
        quantized = sum(entry.weights for entry in self.quantized())
        bits = sum(entry.stored_bits for entry in self) / max(weights, 1)
        every, others = weights + self.other_parameters, self.other_parameters
        kept = weights - quantized
        return (
            f"{len(self.quantized())} of {len(self)} linear layers quantized, {quantized / max(every, 1):.1%} of the "
            f"model's {every:,} parameters, to {bits:.2f} bits per weight over all linear layers; "
            f"{2 * (kept + others) / 1e6:,.1f} MB stay in 16 bits: {kept:,} weights of linear layers and {others:,} "
            "other parameters"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and the like; :meth:`from_dict` is the inverse."""
        return {
            "model": self.model,
            "scheme": self.scheme,
            "other_parameters": self.other_parameters,
            "entries": [asdict(entry) for entry in self],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Plan:
        """Raises ValueError if ``record`` is not what :meth:`to_dict` made, or names an unknown scheme."""
        try:
            entries = [PlanEntry(**entry) for entry in record["entries"]]
            plan = cls(record["model"], record["scheme"], entries, record.get("other_parameters", 0))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a stored plan: {error}") from None
        Scheme.parse(plan.scheme)
        for scheme in {entry.scheme for entry in plan.quantized()}:
            Scheme.parse_for_layer(scheme)
        return plan

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of :meth:`to_json`; ValueError if ``text`` is no plan."""
        return cls.from_dict(json.loads(text))


def plan(
    model: nn.Module,
    scheme: str | Scheme = "w4a8_g128",
    *,
    budget_bits: float | None = None,
    calibration: Calibration | None = None,
    errors: Mapping[str, Mapping[str, float]] | None = None,
    rows: Mapping[str, float] | None = None,
) -> Plan:
    """What :func:`ditq_kernels.model.conversion.quantize` would do to ``model``, by its class's recipe or the general
    one.

    With a budget, each layer that the recipe quantizes gets, of the weight formats
    :data:`ditq_kernels.model.budget.WEIGHTS`, the one that makes the sum of the layers' errors least; its activations
    are those of ``scheme``.

    Args:
        budget_bits: stored bits per weight, scales included, over the layers quantized.
        calibration: tells the general recipe which layers are fed one row per sample, as modulations are; else their
            names have to. For a budget it must have second moments: a layer's error is then the relative noise of its
            output, and without a calibration that of its weight.
        errors: the errors themselves, by layer and scheme, such as
            :func:`ditq_kernels.analysis.sensitivity.squared_errors` gives; in place of ``calibration``.
        rows: rows per sample by layer, as :func:`ditq_kernels.model.observation.rows_per_sample` sees them in one
            forward pass, which may be one of shapes only; in place of the calibration's.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for an unknown scheme, a model that has no linear layer left to quantize or whose projections are
            fused, a budget below what the smallest formats take, or errors that lack a layer or scheme.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; of a pipeline, give its transformer")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which has no parent to be replaced in; use QuantLinear.from_linear"
        )
    scheme = Scheme.parse(scheme)
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no unquantized linear layer")
    if rows is None and calibration is not None:
        calibration.check(model)
        rows = calibration.rows
    recipe = recipe_for(bare(model), {own_name(name): count for name, count in (rows or {}).items()})
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False) and hasattr(module, "unfuse_projections"):
            raise ValueError(
                f"the projections of {name} are fused, and would stay in 16 bits: unfuse_qkv_projections() first, and "
                "fuse them when they are quantized"
            )
    owners = _other_owners(model)
    entries = []
    for name, layer in layers.items():
        rule = recipe.rule_for(own_name(name))
        of_layer = scheme.of_layer(recipe.is_behind_activation(own_name(name)))
        wanted = {"keep": None, "weight_only": scheme.weight_only, "scheme": of_layer}[rule.treatment]
        reason, obstacle = rule.reason, obstacle_to(layer)
        if scheme.mixed and wanted is not None and wanted.activation.scaling == "token":
            reason += "; behind an activation function, its range is found at run time"
        if obstacle is None and id(layer.weight) in owners:
            obstacle = f"its weight is also that of {owners[id(layer.weight)]}, and would be stored twice"
        if obstacle:
            wanted, reason = None, obstacle
        elif wanted is not None and _too_narrow(layer.in_features, wanted):
            wanted, reason = None, _narrow_reason(layer.in_features, scheme)
        entries.append(
            PlanEntry(name, _name(wanted), reason, layer.in_features, layer.out_features, fixed=bool(obstacle))
        )
    chosen = Plan(type(model).__name__, scheme.name, entries, _parameters_elsewhere(model, layers.values()))
    if budget_bits is not None and not math.isfinite(budget_bits):
        raise ValueError(f"budget_bits must be a number of bits, got {budget_bits}")
    if calibration is not None and errors is not None:
        raise ValueError("errors stand in place of a calibration; give one of the two")
    if budget_bits is None:
        if errors is not None:
            raise ValueError("errors choose among formats under a budget; give budget_bits too")
        return chosen
    moments = {} if calibration is None else calibration.named_as_in(model).moments
    if calibration is not None and not moments:
        raise ValueError("the calibration has no second moments; calibrate with moments=True")
    if calibration is not None:
        lacking = [entry.name for entry in chosen.quantized() if entry.name not in moments]
        if lacking:
            raise ValueError(f"the calibration has no second moments of {lacking[0]}; calibrate with moments=True")
    _spend(chosen, layers, budget_bits, moments, errors)
    return chosen


def _other_owners(model: nn.Module) -> dict[int, str]:
    """Names of modules that are no linear layers, by the id of each of their parameters."""
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }


def _parameters_elsewhere(model: nn.Module, layers: Iterable[nn.Linear]) -> int:
    """How many of the model's own parameters are neither a weight of ``layers`` nor stored in low bits already."""
    adapters = {id(p) for module in adapters_modules(model) for p in module.parameters(recurse=False)}
    weights = {id(layer._parameters.get("weight")) for layer in layers}
    return sum(
        p.numel() for p in model.parameters() if id(p) not in adapters | weights and not isinstance(p, StoredPart)
    )


def _spend(
    chosen: Plan,
    layers: Mapping[str, nn.Linear],
    budget_bits: float,
    moments: Mapping[str, torch.Tensor],
    errors: Mapping[str, Mapping[str, float]] | None,
) -> None:
    """Give every quantized layer of ``chosen`` what the budget has for it."""
    options: dict[str, list[Option]] = {}
    for entry in chosen.quantized():
        names = [name for name in alternatives(Scheme.parse(entry.scheme)) if not _too_narrow(entry.in_features, name)]
        for name in names:
            if errors is None:
                error = rounding_error(layers[entry.name], name, moments.get(entry.name))
            elif name in errors.get(entry.name, {}):
                error = errors[entry.name][name]
            else:
                raise ValueError(f"errors has no {name} for {entry.name}; measure that layer in that scheme, too")
            options.setdefault(entry.name, []).append(Option(name, replace(entry, scheme=name).stored_bits, error))
    weights = sum(entry.weights for entry in chosen.quantized())
    try:
        found = allocate(options, budget_bits * weights)
    except ValueError:
        least = sum(min(option.bits for option in of_layer) for of_layer in options.values()) / weights
        raise ValueError(
            f"no plan has {budget_bits} bits per weight; the smallest formats take {least:.2f}, scales included"
        ) from None
    for name, option in found.items():
        chosen.set(name, option.scheme, f"{chosen[name].reason}; {Scheme.parse(option.scheme).weight.name} by budget")


def obstacle_to(layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be replaced by a QuantLinear, or None."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "part of nn.MultiheadAttention, which reads its weight and never calls it"
    plain = type(layer).forward is nn.Linear.forward and "weight" in getattr(layer, "_parameters", {})
    if not plain:
        return f"a {type(layer).__name__}, whose forward or weight is not that of nn.Linear"
    return None


def _name(scheme: Scheme | None) -> str | None:
    return None if scheme is None else scheme.name


def _too_narrow(in_features: int, scheme: str | Scheme) -> bool:
    scheme = Scheme.parse(scheme)
    return scheme.weight.group is not None and scheme.weight.group > in_features


def _narrow_reason(in_features: int, scheme: Scheme) -> str:
    return f"K = {in_features} is smaller than a group of {scheme.weight.group}"
