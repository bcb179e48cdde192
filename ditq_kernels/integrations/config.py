"""What diffusers and transformers are given as ``quantization_config``, and write into ``config.json``."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..checkpoint.adapters import adapters_beside
from ..checkpoint.manifest import LayerRecord
from ..layer.formats import Scheme
from ..layer.linear import QuantLinear
from ..layer.quantizer import check_clip
from ..model.calibration import is_smoothed
from ..model.conversion import quantized_layers
from ..model.planning import Plan

NAME = "ditq"
COMPUTED = (torch.float16, torch.bfloat16, torch.float32)  # dtypes that a model computes in


class Method(str, Enum):  # these libraries compare it with strings and ask for its value
    DITQ = NAME


class DitqConfig:
    """How a model is quantized. Both libraries know it from their quantizers' tables, so it needs neither of them.

    Args:
        scheme: a scheme or its name; ignored where there is a plan, and for a model that is stored quantized.
        modules_to_not_convert: names of modules, or fnmatch patterns of layers' names, that stay in 16 bits.
        plan: a :class:`ditq_kernels.Plan` of the model, or its dict, in place of the scheme's own.
        clip: see :func:`ditq_kernels.layer.quantizer.quantize_weight`.
        dtype: name of the dtype of what is not quantized, in a stored model.
        layers: of a model that is stored quantized, how each quantized layer is stored
            (:class:`ditq_kernels.checkpoint.manifest.LayerRecord`, as a dict).
        adapters: of a stored model, names of the adapters that ``ditq.save`` stored beside it.
        smoothed: of a stored model, whether ``ditq.smooth`` has scaled the inputs of layers.

    Raises:
        ValueError: for an unknown scheme, and for a static one, which needs a calibration, unless ``layers`` say how
            the model is stored.
    """

    def __init__(
        self,
        scheme: str | Scheme = "w4a8_g128",
        modules_to_not_convert: Collection[str] | None = None,
        plan: Plan | Mapping[str, Any] | None = None,
        clip: float | str | None = None,
        dtype: str | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        adapters: Collection[str] = (),
        smoothed: bool = False,
        quant_method: str = NAME,
    ) -> None:
        self.quant_method = Method.DITQ
        self.scheme = Scheme.parse(scheme).name
        kept = [modules_to_not_convert] if isinstance(modules_to_not_convert, str) else modules_to_not_convert
        self.modules_to_not_convert = list(kept or ())
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.from_dict(dict(plan))
        check_clip(clip)
        self.clip = clip
        self.dtype = dtype
        self.layers = layers
        self.adapters = list(adapters)
        self.smoothed = smoothed
        self._model: weakref.ref[nn.Module] | None = None  # a model may be cast before it is saved
        if layers is None:
            for wanted in {self.scheme} if self.plan is None else {e.scheme for e in self.plan.quantized()}:
                if Scheme.parse(wanted).static:
                    raise ValueError(
                        f"{wanted} needs a calibration, and so a model that is loaded: load it in 16 bits, then "
                        f"ditq.calibrate and ditq.quantize, or load it as {wanted.removesuffix('_static')}"
                    )

    @classmethod
    def of(cls, model: nn.Module) -> DitqConfig:
        """What says how the quantized ``model`` is stored; it follows the model as long as that lives."""
        layers = quantized_layers(model)
        schemes = [layer.scheme.name for layer in layers.values()]
        records = {name: asdict(LayerRecord.of(layer)) for name, layer in layers.items()}
        most = max(schemes, key=schemes.count, default="w8a8")  # of no layer where a model has nothing to quantize
        config = cls(most, dtype=str(dtype_of(model)).removeprefix("torch."), layers=records)
        config.adapters = list(adapters_beside(model))
        config.smoothed = is_smoothed(model)
        config._model = weakref.ref(model)
        return config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of :meth:`to_dict`; with ``return_unused_kwargs``, and those of ``kwargs`` that it has not."""
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set what it has of ``kwargs``; the others."""
        for name in kwargs.keys() & vars(self).keys():
            setattr(self, name, kwargs[name])
        return {name: value for name, value in kwargs.items() if name not in vars(self)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of the model as it is now; ``DitqConfig.from_dict`` is the inverse."""
        model = self._model() if self._model is not None else None
        now = self if model is None else DitqConfig.of(model)
        plan = None if now.plan is None else now.plan.to_dict()
        stored = {name: value for name, value in vars(now).items() if not name.startswith("_")}
        return {**stored, "plan": plan, "quant_method": self.quant_method.value}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __reduce__(self) -> tuple:  # a copy says how its model was when it was made
        return DitqConfig.from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        stored = "" if self.layers is None else f", {len(self.layers)} layers stored"
        return f"DitqConfig({self.scheme!r}, modules_to_not_convert={self.modules_to_not_convert}{stored})"

    def kept(self, names: Collection[str]) -> set[str]:
        """Those of the layers ``names`` that ``modules_to_not_convert`` name; warns of what names none."""
        found: set[str] = set()
        for pattern in self.modules_to_not_convert:
            matched = {name for name in names if fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."}
            if not matched:
                warnings.warn(
                    f"modules_to_not_convert: {pattern!r} names no layer that would be quantized", stacklevel=2
                )
            found |= matched
        return found


def is_ours(config: Any) -> bool:
    """Whether a model's ``quantization_config``, a value or a dict, is of this library."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return method == NAME


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of most of what is not quantized, or of the quantized layers if there is nothing else."""
    counts: dict[torch.dtype, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            counts[module.dtype] = counts.get(module.dtype, 0) + 1
        for parameter in () if isinstance(module, QuantLinear) else module.parameters(recurse=False):
            if parameter.dtype in COMPUTED:  # what layerwise casting stores is another
                counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
