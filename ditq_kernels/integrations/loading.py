"""What becomes of a model's layers while a library loads it: they are quantized one by one as their weights come, or
are there, empty, before stored ones are loaded into them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..checkpoint.manifest import LayerRecord
from ..layer.linear import QuantLinear
from ..memory import return_freed
from ..model.calibration import SMOOTHED
from ..model.conversion import Places, check_plan
from ..model.observation import linear_layers
from ..model.planning import plan
from .config import DitqConfig


class AdaptersLeftOut(UserWarning):
    """A model that was stored with adapters is loaded without them."""


class Loading:
    """Of one model, from its empty skeleton to the end. What is loaded is quantized already if ``config`` says how."""

    def __init__(self, config: DitqConfig) -> None:
        self.config, self.stored = config, config.layers is not None
        self.dtype: torch.dtype | None = None
        self._schemes: dict[str, str] = {}  # of the layers still to be quantized
        self._places: Places | None = None
        self._bar: Any = None

    def choose_dtype(self, asked: torch.dtype | None) -> torch.dtype | None:
        """The dtype of what is not quantized: a stored model keeps its own where none is ``asked`` for."""
        own = self.config.dtype
        self.dtype = getattr(torch, own) if asked is None and own else asked
        return self.dtype

    def begin(self, model: nn.Module, kept: Collection[str] = ()) -> None:
        """Prepare the empty ``model``.

        Args:
            kept: names of layers that the library wants as they are.

        Raises:
            ValueError: for a plan of another model.
        """
        from tqdm.auto import tqdm

        if self.stored:
            self._put_empty_layers(model)
            return
        if not linear_layers(model) and self.config.plan is None:
            return  # such as an autoencoder, where a whole pipeline is to be quantized
        chosen = self.config.plan or plan(model, self.config.scheme)
        check_plan(model, chosen)
        schemes = {entry.name: entry.scheme for entry in chosen.quantized() if entry.name not in kept}
        plain = self.config.kept(schemes)
        self._places = Places(model)
        self._schemes = {name: scheme for name, scheme in schemes.items() if name not in plain}
        self._bar = tqdm(total=len(self._schemes), desc="quantize", unit="layer", leave=False)

    def _put_empty_layers(self, model: nn.Module) -> None:
        modules, places = dict(model.named_modules(remove_duplicate=False)), Places(model)
        absent = [name for name in self.config.layers if not isinstance(modules.get(name), nn.Linear)]
        for name, record in self.config.layers.items():
            if name in absent:
                continue
            layer = LayerRecord(**record).empty_layer(name)
            if record["dtype"] == self.config.dtype:  # others are kept in another by the library
                layer.dtype = self.dtype or layer.dtype
            places.replace(modules[name], layer)
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            warnings.warn(
                f"{absent[0]}{more} are stored and not loaded: a {type(model).__name__} comes without them, as without "
                "fused projections, until it fuses them again, and without adapters for pictures",
                stacklevel=2,
            )

    def quantizes(self, parameter: str) -> bool:
        """Whether the parameter of this name is a weight that :meth:`quantize` is to be given."""
        owner, _, leaf = parameter.rpartition(".")
        return leaf == "weight" and owner in self._schemes

    def quantize(self, model: nn.Module, parameter: str, weight: torch.Tensor) -> None:
        """Replace the layer of a weight by a quantized one; its bias stays what it is, loaded or not."""
        owner = parameter.rpartition(".")[0]
        layer = model.get_submodule(owner)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            quantized = QuantLinear.from_linear(layer, self._schemes.pop(owner), clip=self.config.clip)
        except ValueError as error:
            self._bar.close()
            raise ValueError(f"{owner} cannot be quantized: {error}") from None
        self._places.replace(layer, quantized)
        del layer, weight
        return_freed()
        self._bar.update()

    def end(self, model: nn.Module) -> None:
        """Check that all is there.

        Raises:
            ValueError: naming what the checkpoint lacked.
        """
        if self._bar is not None:
            self._bar.close()
            self._bar = self._places = None  # a bar holds a stream, which a copy of the model could not take
        missing = [name for name, part in model.named_parameters() if part.is_meta]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks {min(missing)}{more}")
        if self.stored and self.config.smoothed:
            setattr(model, SMOOTHED, True)
        if self.stored and self.config.adapters:
            warnings.warn(
                f"{', '.join(self.config.adapters)}: adapters were stored with this {type(model).__name__}; ditq.load "
                "attaches them",
                AdaptersLeftOut,
                stacklevel=2,
            )
