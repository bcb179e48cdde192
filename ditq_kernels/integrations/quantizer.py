"""diffusers' own way to load and save quantized models, for ours: a configuration and a quantizer, and their
registration.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..checkpoint.manifest import LayerRecord
from ..layer.formats import Scheme
from ..layer.linear import QuantLinear
from ..model.conversion import quantized_layers, replace_module
from ..model.planning import plan

NAME = "ditq"


class Method(str, Enum):  # diffusers compares it with strings and asks for its value
    DITQ = NAME


class DitqConfig(QuantizationConfigMixin):
    """How a diffusers model is quantized, as ``quantization_config`` of ``from_pretrained`` and of ``config.json``.

    Args:
        scheme: a scheme or its name; ignored for a model that is stored quantized.
        modules_to_not_convert: names of modules, or fnmatch patterns of layers' names, that stay in 16 bits.
        dtype: name of the dtype of what is not quantized, in a stored model.
        layers: of a model that is stored quantized, how each quantized layer is stored
            (:class:`ditq_kernels.checkpoint.manifest.LayerRecord`, as a dict).

    Raises:
        ValueError: for an unknown scheme, and for a static one, which needs a calibration, unless ``layers`` say how
            the model is stored.
    """

    def __init__(
        self,
        scheme: str | Scheme = "w4a8_g128",
        modules_to_not_convert: Collection[str] | None = None,
        dtype: str | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = Method.DITQ
        self.scheme = Scheme.parse(scheme).name
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.dtype = dtype
        self.layers = layers
        self._model: weakref.ref[nn.Module] | None = None  # a model may be cast before it is saved
        if layers is None and Scheme.parse(scheme).static:
            raise ValueError(
                f"{self.scheme} needs a calibration, and so a model that is loaded: load it in 16 bits, then "
                f"ditq.calibrate and ditq.quantize, or load it as {self.scheme.removesuffix('_static')}"
            )

    @classmethod
    def of(cls, model: nn.Module) -> DitqConfig:
        """What says how the quantized ``model`` is stored."""
        layers = quantized_layers(model)
        schemes = [layer.scheme.name for layer in layers.values()]
        records = {name: asdict(LayerRecord.of(layer)) for name, layer in layers.items()}
        return cls(max(schemes, key=schemes.count), dtype=str(_dtype_of(model)).removeprefix("torch."), layers=records)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of the model as it is now; ``DitqConfig.from_dict`` is the inverse."""
        model = self._model() if self._model is not None else None
        now = self if model is None else DitqConfig.of(model)
        stored = {name: value for name, value in vars(now).items() if name != "_model"}
        return {**stored, "quant_method": self.quant_method.value}

    to_diff_dict = to_dict

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __reduce__(self) -> tuple:  # a copy says how its model was when it was made
        return DitqConfig.from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        stored = "" if self.layers is None else f", {len(self.layers)} layers stored"
        return f"DitqConfig({self.scheme!r}, modules_to_not_convert={self.modules_to_not_convert}{stored})"


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of most of what is not quantized, or of the quantized layers if there is nothing else."""
    counts: dict[torch.dtype, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            counts[module.dtype] = counts.get(module.dtype, 0) + 1
        for parameter in () if isinstance(module, QuantLinear) else module.parameters(recurse=False):
            if parameter.is_floating_point():
                counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


class DitqQuantizer(DiffusersQuantizer):
    """Quantizes a model's layers as they are loaded, or puts empty quantized ones where stored ones are loaded into."""

    quantization_config: DitqConfig
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._schemes: dict[str, str] = {}  # of the layers still to be quantized
        self._bar: Any = None
        self._dtype: torch.dtype | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """A stored model keeps its dtype where none is asked for."""
        stored = self.quantization_config.dtype
        self._dtype = getattr(torch, stored) if torch_dtype is None and stored else torch_dtype
        return self._dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        from tqdm.auto import tqdm

        config = self.quantization_config
        if self.pre_quantized:
            for name, record in (config.layers or {}).items():
                replace_module(model, model.get_submodule(name), LayerRecord(**record).empty_layer(name))
            return
        chosen = plan(model, config.scheme)
        self._schemes = {e.name: e.scheme for e in chosen.quantized() if not self._kept(e.name)}
        self._bar = tqdm(total=len(self._schemes), desc="quantize", unit="layer", leave=False)

    def _kept(self, name: str) -> bool:
        return any(
            fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
            for pattern in self.quantization_config.modules_to_not_convert
        )

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        stored = leaf != "bias" and isinstance(model.get_submodule(owner), QuantLinear)
        return stored or (leaf == "weight" and owner in self._schemes)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> None:
        owner, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, QuantLinear):  # as it is stored: what is given has been cast to the model's dtype
            layer._parameters[leaf] = type(layer._parameters[leaf])(state_dict[param_name].to(target_device))
            return
        layer.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        replace_module(model, layer, QuantLinear.from_linear(layer, self._schemes.pop(owner)))
        self._bar.update()

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._bar is not None:
            self._bar.close()
            self._bar = None  # it holds a stream, which a copy of the model could not take
        missing = [name for name, part in model.named_parameters() if part.is_meta]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks {min(missing)}{more}")
        for layer in quantized_layers(model).values():
            layer.dtype = self._dtype or layer.dtype
        attach(model, self)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters over it are


def attach(model: nn.Module, quantizer: DitqQuantizer | None = None) -> None:
    """Let diffusers know that ``model`` is quantized, so that its ``save_pretrained`` says so."""
    config = DitqConfig.of(model)
    if quantizer is None:
        quantizer = DitqQuantizer(config)
    config._model = weakref.ref(model)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = False  # which would forbid casts; quantized layers cast what can be cast
    model.register_to_config(quantization_config=config)


def register() -> None:
    """Give diffusers' loaders ``quant_method`` "ditq"."""
    auto.AUTO_QUANTIZER_MAPPING[NAME] = DitqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = DitqConfig
