"""What each layer of a changed model makes of what the original's layer is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..analysis.weights import signal_to_noise
from ..model.observation import linear_layers, observe_steps


class _Beside:
    """Runs each layer of another model beside the one that is observed."""

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        self.layers, self.other = linear_layers(model), other
        self.powers: dict[str, tuple[float, float]] = {}  # of the signal and the noise

    def begin(self, step: int, samples: int | None) -> None:
        pass

    def see(self, name: str, x: torch.Tensor) -> None:
        layer = self.other.get_submodule(name)
        exact = nn.functional.linear(x, self.layers[name].weight, self.layers[name].bias).double()
        # A quantized layer takes any dtype; a plain one its own.
        changed = layer(x.to(getattr(layer, "dtype", layer.weight.dtype))).double()
        signal, noise = self.powers.get(name, (0.0, 0.0))
        self.powers[name] = (
            signal + float(exact.square().sum()),
            noise + float((changed - exact).square().sum()),
        )


def layer_snr_db(model: nn.Module, other: nn.Module, runs: Iterable[Callable[[], Any]], step: int) -> dict[str, float]:
    """Signal-to-noise ratio in dB of the outputs of each linear layer of ``other``, fed what those of ``model`` are fed
    in one step of each of ``runs``, which sample with ``model``. Infinite where nothing differs.
    """
    observer = _Beside(model, other)
    for run in runs:
        observe_steps(model, run, [step], observer)
    return {name: signal_to_noise(signal, noise) for name, (signal, noise) in observer.powers.items()}
