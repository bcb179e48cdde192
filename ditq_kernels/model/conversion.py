"""Models to low bits, in place, one layer at a time."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..layer.compensation import compensation_bytes
from ..layer.formats import Scheme
from ..layer.linear import QuantLinear
from ..layer.quantizer import check_clip
from ..memory import return_freed, warn_of_shortage
from . import hosts
from .calibration import Calibration
from .observation import linear_layers
from .plan_entry import PlanEntry
from .planning import Plan, obstacle_to, plan

ROUNDINGS = ("nearest", "compensated")


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Name to layer, of every quantized layer in ``model``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


class Places:
    """Where the modules of ``model`` stand in it: one may be registered under several names."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._of.setdefault(child, []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` stands."""
        for parent, name in self._of.pop(old, ()):
            setattr(parent, name, new)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands in ``model``; of many, :class:`Places` does it without a search for each."""
    Places(model).replace(old, new)


def quantize(
    model: nn.Module,
    scheme_or_plan: str | Scheme | Plan,
    calibration: Calibration | None = None,
    rounding: str = "nearest",
    *,
    clip: float | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace linear layers of ``model`` by :class:`QuantLinear`, in place; returns ``model``.

    Each 16-bit weight is freed as its layer is done, so that the peak is the model and one layer. Everything is checked
    first: on a TypeError or ValueError the model is as it was.

    Args:
        scheme_or_plan: a scheme or its name (planned by :func:`plan`, with the calibration), or a plan made for this
            model.
        calibration: what static schemes and compensated rounding need; left as it is.
        rounding: "nearest", or "compensated": a weight's rounding error is made up for by the weights rounded after
            it, as the calibration's second moments say.
        clip: None keeps each group's whole range; else a ratio in (0, 1], or "search": see
            :func:`ditq_kernels.layer.quantizer.quantize_weight`.
        progress: whether to show a bar.

    Raises:
        TypeError: for arguments of the wrong kind.
        ValueError: for an unknown scheme, rounding or clip; a plan or calibration of another model; a model that is
            quantized already, if no plan says what is still to be done; a layer that is quantized already, lacks the
            calibration that its scheme needs, has forward hooks, or whose weights are not finite or not there.
    """
    if isinstance(scheme_or_plan, Plan):
        chosen = scheme_or_plan
    else:
        _check_request(model, calibration, rounding, clip)
        chosen = plan(model, scheme_or_plan, calibration=calibration)
        check_unquantized(model, chosen.scheme)
    check(model, chosen, calibration, rounding, clip)
    return convert(model, chosen, calibration, rounding, clip=clip, progress=progress)


def convert(
    model: nn.Module,
    chosen: Plan,
    calibration: Calibration | None,
    rounding: str,
    *,
    clip: float | str | None,
    progress: bool,
) -> nn.Module:
    """:func:`quantize` of what :func:`check` has found right."""
    from tqdm.auto import tqdm

    calibration = None if calibration is None else calibration.named_as_in(model)
    places = Places(model)
    try:
        for entry in tqdm(chosen.quantized(), desc="quantize", unit="layer", leave=False, disable=not progress):
            scheme = Scheme.parse(entry.scheme)
            layer = model.get_submodule(entry.name)
            quantized = QuantLinear.from_linear(
                layer,
                scheme,
                input_amax=calibration.amax[entry.name] if scheme.static else None,
                input_moment=calibration.moments[entry.name] if rounding == "compensated" else None,
                clip=clip,
            )
            places.replace(layer, quantized)
            del layer
            return_freed()
    finally:  # interrupted, it is quantized as far as it is, and must not be stored as if it were not
        if quantized_layers(model):
            hosts.tell(model)
    return model


def check(
    model: nn.Module, chosen: Plan, calibration: Calibration | None, rounding: str, clip: float | str | None
) -> None:
    """Raise what :func:`quantize` would, and touch nothing."""
    _check_request(model, calibration, rounding, clip)
    if calibration is not None:
        calibration.check(model)
        calibration = calibration.named_as_in(model)
    check_plan(model, chosen)
    for entry in chosen.quantized():
        _check_layer(entry, model.get_submodule(entry.name))
        _check_calibration(entry, calibration, rounding)
    if rounding == "compensated" and (entries := chosen.quantized()):
        widest = max(entries, key=lambda entry: entry.in_features)
        warn_of_shortage(
            compensation_bytes(widest.in_features),
            f"compensated rounding of {widest.name} takes",
            "round to nearest, or give it another plan",
            stacklevel=3,
        )


def check_unquantized(model: nn.Module, scheme: str) -> None:
    """Raise ValueError if ``model``, which is to be quantized to ``scheme``, holds a quantized layer."""
    for name, layer in quantized_layers(model).items():
        raise ValueError(
            f"{type(model).__name__} is quantized already ({name} to {layer.scheme}): quantize the 16-bit model to "
            f"{scheme}, or pass ditq.plan(model, {scheme!r}) to quantize what is left in 16 bits"
        )


def _check_request(model: nn.Module, calibration: Calibration | None, rounding: str, clip: float | str | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; of a pipeline, give its transformer")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must come from ditq.calibrate, got {type(calibration).__name__}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; allowed: {', '.join(ROUNDINGS)}")
    if rounding == "compensated" and calibration is None:
        raise ValueError(
            'rounding="compensated" needs second moments: calibration=ditq.calibrate(model, run, moments=True)'
        )
    check_clip(clip)


def check_plan(model: nn.Module, chosen: Plan) -> None:
    """Raise ValueError unless every layer of the plan is one of ``model``, still to be quantized and of that shape."""
    layers = linear_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in chosen:
        name = entry.name
        if isinstance(modules.get(name), QuantLinear):
            raise ValueError(f"{name} is quantized already; make the plan from the model as it is now")
        if name not in layers:
            raise ValueError(f"the plan is not this model's: {type(model).__name__} has no linear layer {name}")
        layer = layers[name]
        if (layer.in_features, layer.out_features) != (entry.in_features, entry.out_features):
            found, planned = (f"{one.in_features} -> {one.out_features}" for one in (layer, entry))
            raise ValueError(f"the plan is not this model's: {name} is {found}, the plan says {planned}")


def _check_layer(entry: PlanEntry, layer: nn.Linear) -> None:
    name, weight = entry.name, layer.weight
    group = Scheme.parse(entry.scheme).weight.group
    obstacle = obstacle_to(layer) or (entry.reason if entry.fixed else None)
    if obstacle:
        raise ValueError(f"{name} cannot be quantized: {obstacle}")
    if group is not None and group > entry.in_features:
        raise ValueError(
            f"{name} cannot take {entry.scheme}: K = {entry.in_features} is smaller than a group of {group}"
        )
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise ValueError(f"{name} has forward hooks, which would be lost; remove them (or disable offloading) first")
    if weight.is_meta:
        raise ValueError(
            f"the weight of {name} is on the meta device: load the weights first, offload after quantizing"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {name} holds NaN or infinite values; keep that layer in 16 bits, or repair it")


def _check_calibration(entry: PlanEntry, calibration: Calibration | None, rounding: str) -> None:
    name, scheme = entry.name, Scheme.parse(entry.scheme)
    if scheme.static:
        dynamic = scheme.name.removesuffix("_static")
        if calibration is None:
            raise ValueError(f"{scheme} needs calibration=ditq.calibrate(model, run); {dynamic} needs none")
        amax = calibration.amax.get(name)
        if amax is None:
            raise ValueError(
                f"the calibrated step never called {name}, so it cannot take {scheme}; give it {dynamic} or None"
            )
        if not (math.isfinite(amax) and amax > 0):
            raise ValueError(
                f"the calibration holds amax = {amax} for {name}, so it cannot take {scheme}; give it {dynamic}"
            )
    if rounding == "compensated":
        moment = calibration.moments.get(name)
        if moment is None:
            raise ValueError(
                f"the calibration has no second moment of {name}; calibrate with moments=True, or give that layer None "
                'in the plan, or use rounding="nearest"'
            )
        shape = [entry.in_features, entry.in_features]
        if list(moment.shape) != shape or not bool(torch.isfinite(moment).all()) or bool((moment.diagonal() < 0).any()):
            raise ValueError(f"the second moment of {name} must be a finite {shape} sum of x x^T; calibrate again")
