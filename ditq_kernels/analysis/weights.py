"""How the weights of linear layers spread: per layer, per output channel, per group of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..model.observation import linear_layers

GROUP = 128


@dataclass(frozen=True)
class WeightStatistics:
    """Of one [N, K] weight.

    Attributes:
        amax: largest magnitude; rms: root of the mean square.
        channel_spread: largest magnitude of the widest output channel over that of the median one: what one scale for
            the whole layer would cost.
        group_gain: bits that a scale per group of inputs saves over one per output channel, log2 of the channel's
            largest magnitude over its groups', on average.
        tail: largest magnitude over the rms of its channel, of the median channel: of a Gaussian about 3.5 at
            K = 1000, larger where few weights reach far.
    """

    out_features: int
    in_features: int
    amax: float
    rms: float
    channel_spread: float
    group_gain: float
    tail: float


def weight_statistics(weight: torch.Tensor, group: int = GROUP) -> WeightStatistics:
    """Statistics of ``weight`` [N, K], whose channels of zeros are left out.

    Raises:
        ValueError: if it holds NaN or infinite values, or zeros alone.
    """
    w = weight.detach().to(torch.float32)
    channel = w.abs().amax(1)
    if not bool(torch.isfinite(channel).all()):
        raise ValueError("the weight holds NaN or infinite values")
    w, channel = w[channel > 0], channel[channel > 0]
    if not len(w):
        raise ValueError("the weight holds zeros alone")
    groups = F.pad(w, (0, -w.shape[1] % group)).unflatten(1, (-1, group)).abs().amax(2)
    filled = groups > 0
    gain = torch.log2(channel.unsqueeze(1) / groups.where(filled, channel.unsqueeze(1)))
    return WeightStatistics(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        amax=float(channel.max()),
        rms=float(weight.detach().to(torch.float64).square().mean().sqrt()),
        channel_spread=float(channel.max() / channel.median()),
        group_gain=float(gain[filled].mean()),
        tail=float((channel / (w.square().mean(1).sqrt())).median()),
    )


def all_weights(model: nn.Module) -> dict[str, WeightStatistics]:
    """By linear layer; layers of zeros alone are left out.

    Raises:
        ValueError: if a weight holds NaN or infinite values, naming the layer.
    """
    found = {}
    for name, layer in linear_layers(model).items():
        if not bool(layer.weight.detach().any()):
            continue
        try:
            found[name] = weight_statistics(layer.weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def signal_to_noise(signal: float, noise: float) -> float:
    """Decibels of two sums of squares; infinite without noise, minus infinity without a signal, or where the noise is
    NaN or infinite.
    """
    if noise <= 0:
        return math.inf
    if not math.isfinite(noise) or signal <= 0:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))
