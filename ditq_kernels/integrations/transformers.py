"""transformers' models, the text encoders of pipelines: its ``from_pretrained`` and ``save_pretrained`` know quantized
ones once this is imported, as diffusers' do for its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from . import peft
from .config import NAME, DitqConfig, is_ours
from .loading import Loading
from .saving import saving


class _Quantize(ConversionOps):
    """What the loader does with a weight that is to be quantized: it is put in its place, and nothing is left to do."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        ((_, weight),) = input_dict.items()
        self._loading.quantize(model, full_layer_name, weight[0] if isinstance(weight, list) else weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class DitqHfQuantizer(HfQuantizer):
    """Quantizes a model's layers as they are loaded, or puts empty quantized ones where stored ones are loaded into."""

    quantization_config: DitqConfig

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading = Loading(quantization_config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._loading.choose_dtype(dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        tied = {**model.all_tied_weights_keys}
        self._loading.begin(model, kept={name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())})

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return self._loading.quantizes(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._loading)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self._loading.end(model)
        attach(model, self)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters over it are

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, quantizer: DitqHfQuantizer | None = None) -> None:
    """Let transformers know that ``model`` is quantized, so that its ``save_pretrained`` says so."""
    config = DitqConfig.of(model)
    if quantizer is None:
        quantizer = DitqHfQuantizer(config)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    set_config(model, config)


def set_config(model: nn.Module, config: DitqConfig | None) -> None:
    """Put ``config`` into the model's, or take ours out of it, and out of those of its parts, which it loads."""
    own = model.config
    for held in (own, *(part for part in vars(own).values() if isinstance(part, PreTrainedConfig))):
        if is_ours(getattr(held, "quantization_config", None)):
            del held.quantization_config
    if config is not None:
        own.quantization_config = config


@functools.cache
def register() -> None:
    """Give transformers' loaders ``quant_method`` "ditq", and its models a ``save_pretrained`` that knows of it."""
    auto.AUTO_QUANTIZER_MAPPING[NAME] = DitqHfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = DitqConfig
    peft.teach()
    PreTrainedModel.save_pretrained = saving(PreTrainedModel.save_pretrained, set_config)


register()
