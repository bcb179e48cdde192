"""How many rows of each sample a linear layer is fed: what tells a modulation or an embedder of the time, which are fed
one, from a product over all tokens.
"""

from __future__ import annotations

from typing import Any

import torch


def samples_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many samples a call of a model is given, by the first of its arguments that has them: a tensor of three or
    more dimensions, whose first they are, or a list of tensors, one each. None if there is no such argument.
    """
    for value in (kwargs.get("hidden_states"), *args, *kwargs.values()):  # what diffusers calls what is sampled
        if isinstance(value, torch.Tensor) and value.ndim >= 3:
            return value.shape[0]
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, torch.Tensor) for one in value):
            return len(value)
    return None


class Rows:
    """Counts, for each layer, the most rows per sample that one call of the model feeds it; a
    :class:`ditq_kernels.model.observation.CallObserver`.

    Attributes:
        per_sample: by the layer's name; empty where the number of samples is not known.
    """

    def __init__(self) -> None:
        self.per_sample: dict[str, float] = {}
        self._samples: int | None = None
        self._in_call: dict[str, int] = {}

    def begin(self, step: int, samples: int | None) -> None:
        """A call of the model with so many samples begins, in whichever step."""
        self._samples, self._in_call = samples, {}

    def see(self, name: str, x: torch.Tensor) -> None:
        """The layer ``name`` is fed ``x`` [..., K]."""
        if self._samples:
            self._in_call[name] = self._in_call.get(name, 0) + x.shape[:-1].numel()
            self.per_sample[name] = max(self.per_sample.get(name, 0.0), self._in_call[name] / self._samples)
