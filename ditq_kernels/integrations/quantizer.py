"""diffusers' own way to load and save quantized models, for ours: a quantizer and its registration."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..layer.linear import QuantLinear
from ..model.recipes import repeated_blocks
from .config import NAME, DitqConfig, is_ours
from .loading import Loading


class DitqQuantizer(DiffusersQuantizer):
    """Quantizes a model's layers as they are loaded, or puts empty quantized ones where stored ones are loaded into."""

    quantization_config: DitqConfig
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading = Loading(quantization_config)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        return self._loading.choose_dtype(torch_dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self._loading.begin(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        stored = leaf != "bias" and isinstance(model.get_submodule(owner), QuantLinear)
        return stored or self._loading.quantizes(param_name)

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
            setattr(layer, leaf, nn.Parameter(state_dict[param_name].to(target_device), requires_grad=False))
        else:
            self._loading.quantize(model, param_name, param_value.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self._loading.end(model)
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
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = False  # which would forbid casts; quantized layers cast what can be cast
    set_config(model, config)
    if not getattr(model, "_repeated_blocks", None):  # what compile_repeated_blocks compiles, which some classes lack
        model._repeated_blocks = sorted({type(block).__name__ for block in repeated_blocks(model).values()})


def set_config(model: nn.Module, config: DitqConfig | None) -> None:
    """Put ``config`` into the model's, or take ours out of it. Into the same value: libraries note there what they have
    changed of the model, such as an adapter for pictures, and ``register_to_config`` would make another. A model of
    models side by side has none.
    """
    held = getattr(model, "config", None)
    if held is None:
        return
    if config is not None:
        held["quantization_config"] = held.quantization_config = config
    elif is_ours(held.get("quantization_config")):
        OrderedDict.__delitem__(held, "quantization_config")
        del held.quantization_config


def register() -> None:
    """Give diffusers' loaders ``quant_method`` "ditq"."""
    auto.AUTO_QUANTIZER_MAPPING[NAME] = DitqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = DitqConfig
