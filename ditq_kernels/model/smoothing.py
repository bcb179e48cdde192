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

from .calibration import SMOOTHED, Calibration
from .observation import linear_layers
from .recipes import Fold, recipe_for
from .wrappers import bare


@torch.no_grad()
def smooth(model: nn.Module, calibration: Calibration, strength: float = 0.5) -> Calibration:
    """Smooth ``model`` in place, wherever its recipe knows how; returns the calibration of the smoothed model, which is
    the one to quantize it with. The model computes the same but for rounding; in 16 bits and with large factors, a
    modulation's bias comes near -1 and loses digits, which smoothing in fp32 and converting afterwards does not mend.
    Adapters that were trained for the model as it was do not fit it any more: fuse them before.

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
    found = list(_folds(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} cannot be smoothed: its recipe names no layer to fold the division into"
        )
    layers = linear_layers(model)
    for fold, consumers, producers in found:
        for name, module in (consumers | producers).items():
            if name not in layers and not _is_norm(module):
                raise ValueError(
                    f"{name} is quantized already, or has adapters, which would not fit any more: smooth the 16-bit "
                    "model, with adapters fused"
                )
        for name in consumers:
            if name not in calibration.channel_amax:
                raise ValueError(f"the calibration has no channel ranges of {name}; calibrate this model again")
        for name, module in producers.items():
            if fold.gains and module.bias is None:
                raise ValueError(f"{name} has no bias, which smoothing a modulation needs; leave the model as it is")
    factors: dict[str, torch.Tensor] = {}
    for fold, consumers, producers in found:
        columns = _part(layers[next(iter(consumers))].in_features, *fold.inputs)
        amax = torch.stack([calibration.channel_amax[name][columns] for name in consumers]).amax(0)
        factor = _factor(amax, [layers[name].weight[:, columns] for name in consumers], strength)
        whole = torch.ones(layers[next(iter(consumers))].in_features)
        whole[columns] = factor
        for name in consumers:
            weight = layers[name].weight[:, columns]
            # The factor in fp32: rounded to 16 bits it would not be what the producers divide by.
            weight.copy_(weight.float() * factor.to(weight.device))
            # Layers fed the same share one tensor, by which their moments go on being shared.
            factors[name] = factors[name] * whole if name in factors else whole
        for module in producers.values():
            _divide_outputs(module, fold, factor)
    setattr(bare(model), SMOOTHED, True)
    return _smoothed(calibration, factors)


def _folds(model: nn.Module) -> Iterator[tuple[Fold, dict[str, nn.Module], dict[str, nn.Module]]]:
    """(fold, its consumers, its producers) for each block of ``model`` that has such layers, in sizes that fit."""
    modules = dict(model.named_modules())
    for fold in recipe_for(model).folds:
        for block in modules:
            if not re.fullmatch(fold.block, block):
                continue
            consumers, producers = (
                {
                    f"{block}.{name}": modules[f"{block}.{name}"]
                    for name in names
                    if getattr(modules.get(f"{block}.{name}"), "weight", None) is not None
                }
                for names in (fold.consumers, fold.producers)
            )
            made = {_outputs(module) / (1 if _is_norm(module) else fold.chunks) for module in producers.values()}
            wanted = {module.in_features / fold.inputs[1] for module in consumers.values()}
            if len(made) == 1 and made == wanted:
                yield fold, consumers, producers


def _is_norm(module: nn.Module) -> bool:
    return module.weight.dim() == 1


def _outputs(module: nn.Module) -> int:
    return module.weight.numel() if _is_norm(module) else module.out_features


def _part(size: int, index: int, count: int) -> slice:
    return slice(size // count * index, size // count * (index + 1))


def _factor(amax: torch.Tensor, weights: list[torch.Tensor], strength: float) -> torch.Tensor:
    """fp32 [K]; 1 for channels that are nothing but zeros."""
    of_weights = torch.stack([weight.abs().amax(0).float().cpu() for weight in weights]).amax(0)
    factor = amax.float() ** strength / of_weights ** (1 - strength)
    return torch.where((amax > 0) & (of_weights > 0), factor, torch.ones_like(factor))


def _divide_outputs(module: nn.Module, fold: Fold, factor: torch.Tensor) -> None:
    """Make ``module`` put out what divides the consumers' input by ``factor``."""
    inverse = 1 / factor.to(module.weight.device, torch.float64)
    if _is_norm(module):
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter.copy_(parameter * inverse)
        return
    for part in fold.shifts + fold.gains:
        rows = _part(module.out_features, part, fold.chunks)
        module.weight[rows] = (module.weight[rows] * inverse.unsqueeze(1)).to(module.weight.dtype)
        if part in fold.gains:  # (1 + gain) / s = 1 + (gain / s + 1 / s - 1)
            module.bias[rows] = (module.bias[rows] * inverse + inverse - 1).to(module.bias.dtype)
        elif module.bias is not None:
            module.bias[rows] = (module.bias[rows] * inverse).to(module.bias.dtype)


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
    return replace(calibration, amax=amax, channel_amax=channels, moments=moments, smoothed=True)
