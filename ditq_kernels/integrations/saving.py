"""A library's ``save_pretrained``, for models that may hold quantized layers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ..checkpoint.adapters import adapters_beside, without_adapters
from ..model.conversion import quantized_layers
from ..model.wrappers import adapted_layers
from .config import DitqConfig


def saving(original: Callable, set_config: Callable[[nn.Module, DitqConfig | None], None]) -> Callable:
    """``original``, before which the model's configuration says how it is stored now: layers may have been quantized
    one by one or in a part of it, and a configuration may have come from another model that is. Adapters are left out:
    layers would be stored under names that no loader asks for.

    Args:
        set_config: puts a configuration into a model's, or takes ours out of it.
    """

    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not quantized_layers(self):
            set_config(self, None)
            return original(self, *args, **kwargs)
        if adapted_layers(self) and not adapters_beside(self):
            names = ", ".join(getattr(self, "peft_config", {"adapters": None}))
            warnings.warn(
                f"{names}: adapters are not saved with the model; ditq.save stores them beside it, a pipeline's "
                "save_lora_weights by themselves",
                stacklevel=2,
            )
        with without_adapters(self):
            set_config(self, DitqConfig.of(self))
            return original(self, *args, **kwargs)

    return save_pretrained
