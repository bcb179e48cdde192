"""Smoothing: input channels with large values are divided, their weights multiplied, and the division is folded into
the layer that makes the input. Costs nothing at run time, and computes the same but for rounding.

The factors are those of SmoothQuant (Xiao et al., arXiv 2211.10438); folding them into a diffusion transformer's
modulation and value projection is what DiTAS (Dong and Zhang, arXiv 2409.07756) does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from .calibration import Calibration
from .observation import linear_layers
from .recipes import Fold, recipe_for


@torch.no_grad()
def smooth(model: nn.Module, calibration: Calibration, strength: float = 0.5) -> Calibration:
    """Smooth ``model`` in place, wherever its recipe knows how; returns the calibration of the smoothed model, which is
    the one to quantize it with. The model computes the same but for rounding; in 16 bits and with large factors, a
    modulation's bias comes near -1 and loses digits, which smoothing in fp32 and converting afterwards does not mend.

    Channel k of the layers fed the same is divided by ``s[k] = amax_x[k] ** strength / amax_w[k] ** (1 - strength)``.

    Args:
        calibration: of ``model`` as it is, its ranges not percentiles; left as it is.
        strength: from 0 (only the weights' columns are evened out) to 1 (only the inputs' channels are).

    Raises:
        TypeError: for arguments of the wrong kind.
        ValueError: if ``strength`` is outside [0, 1], the model's architecture has nothing to fold into, a layer is
            quantized already, or the calibration is another model's, holds percentiles, or did not see a layer.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must come from ditq.calibrate, got {type(calibration).__name__}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    if calibration.percentile is not None:
        raise ValueError("smoothing needs the whole range of each channel; calibrate without a percentile")
    calibration.check(model)
    layers = linear_layers(model)
    found = list(_folds(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} cannot be smoothed: its recipe names no layer to fold the division into"
        )
    for fold, consumers, producer in found:
        for name in (*consumers, producer):
            if name not in layers:
                raise ValueError(f"{name} is quantized already, or missing; smooth the model before quantizing it")
        if consumers[0] not in calibration.channel_amax:
            raise ValueError(f"the calibration has no channel ranges of {consumers[0]}; calibrate this model again")
        if fold.gain is not None and layers[producer].bias is None:
            raise ValueError(f"{producer} has no bias, which smoothing a modulation needs; leave the model as it is")
    factors: dict[str, torch.Tensor] = {}
    for fold, consumers, producer in found:
        factor = _factor(calibration.channel_amax[consumers[0]], [layers[name] for name in consumers], strength)
        for name in consumers:
            weight = layers[name].weight
            # The factor in fp32: rounded to 16 bits it would not be what the producer divides by.
            weight.copy_(weight.float() * factor.to(weight.device))
            factors[name] = factor
        _divide_outputs(layers[producer], fold, factor)
    return _smoothed(calibration, factors)


def _folds(model: nn.Module) -> Iterator[tuple[Fold, list[str], str]]:
    """(fold, names of its consumers, name of its producer) for each block of ``model``."""
    for fold in recipe_for(model).folds:
        for name, _ in model.named_modules():
            if re.fullmatch(fold.block, name):
                yield fold, [f"{name}.{consumer}" for consumer in fold.consumers], f"{name}.{fold.producer}"


def _factor(amax: torch.Tensor, layers: list[nn.Linear], strength: float) -> torch.Tensor:
    """fp32 [K]; 1 for channels that are nothing but zeros."""
    of_weights = torch.stack([layer.weight.abs().amax(0).float().cpu() for layer in layers]).amax(0)
    factor = amax.float() ** strength / of_weights ** (1 - strength)
    return torch.where((amax > 0) & (of_weights > 0), factor, torch.ones_like(factor))


def _divide_outputs(layer: nn.Linear, fold: Fold, factor: torch.Tensor) -> None:
    """Make ``layer`` put out what divides the consumers' input by ``factor``."""
    rows = layer.out_features // fold.chunks
    inverse = 1 / factor.to(layer.weight.device, torch.float64)
    for part in (fold.shift, fold.gain):
        if part is None:
            continue
        chosen = slice(part * rows, (part + 1) * rows)
        layer.weight[chosen] = (layer.weight[chosen] * inverse.unsqueeze(1)).to(layer.weight.dtype)
        if part == fold.gain:  # (1 + gain) / s = 1 + (gain / s + 1 / s - 1)
            layer.bias[chosen] = (layer.bias[chosen] * inverse + inverse - 1).to(layer.bias.dtype)
        elif layer.bias is not None:
            layer.bias[chosen] = (layer.bias[chosen] * inverse).to(layer.bias.dtype)


def _smoothed(calibration: Calibration, factors: dict[str, torch.Tensor]) -> Calibration:
    """What calibrating the smoothed model would find."""
    channels = {
        name: amax / factors[name] if name in factors else amax for name, amax in calibration.channel_amax.items()
    }
    amax = {
        name: float(channels[name].amax()) if name in factors else value for name, value in calibration.amax.items()
    }
    divided: dict[tuple[int, int], torch.Tensor] = {}
    moments = {}
    for name, moment in calibration.moments.items():
        if name not in factors:
            moments[name] = moment
            continue
        key = id(moment), id(factors[name])  # layers fed the same go on sharing one tensor
        if key not in divided:
            divided[key] = moment / torch.outer(factors[name], factors[name])
        moments[name] = divided[key]
    return replace(calibration, amax=amax, channel_amax=channels, moments=moments)
