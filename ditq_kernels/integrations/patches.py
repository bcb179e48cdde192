"""Functions of diffusers that would do the wrong thing with quantized layers, most of them in silence, replaced by ones
that do the right one.

``fuse_qkv_projections`` would join decoded weights to 16-bit layers: packed ones are joined instead. A ControlNet's
``from_transformer`` loads what has the same name, and would leave at random what is stored under others: it is decoded.
FLUX's ``load_lora_weights`` looks for weights in the model's state dict, and does not find stored ones. Group
offloading moves parameters from under fused projections, and caches look blocks up by their class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable

import torch
from diffusers import hooks
from diffusers.hooks import group_offloading
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..layer.concatenation import concatenated, obstacle_to_concatenation
from ..layer.linear import QuantLinear
from ..model.calibration import is_smoothed
from ..model.conversion import quantized_layers
from ..model.fusion import part_projections
from ..model.substituted_class import class_before
from . import peft
from .quantizer import set_config
from .saving import saving

# The layer that joins others, by the module of an attention.
JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
CONTROLNETS = {
    "diffusers.models.controlnets.controlnet_flux": "FluxControlNetModel",
    "diffusers.models.controlnets.controlnet_hunyuan": "HunyuanDiT2DControlNetModel",
    "diffusers.models.controlnets.controlnet_qwenimage": "QwenImageControlNetModel",
    "diffusers.models.controlnets.controlnet_sd3": "SD3ControlNetModel",
}


def _joining(original: Callable) -> Callable:
    @functools.wraps(original)
    def fuse_projections(self: nn.Module, *args, **kwargs):
        before = {name: getattr(self, name, None) for name in JOINED}
        result = original(self, *args, **kwargs)
        for name, parts in JOINED.items():
            layers = [getattr(self, part, None) for part in parts]
            if getattr(self, name, None) is before[name] or not any(isinstance(x, QuantLinear) for x in layers):
                continue
            obstacle = obstacle_to_concatenation(layers)
            if obstacle is None:
                setattr(self, name, concatenated(layers))
            else:
                warnings.warn(f"{name} joins {', '.join(parts)} in 16 bits: {obstacle}", stacklevel=2)
        return result

    return fuse_projections


def _decoding(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_transformer(cls: type, *args, **kwargs):
        controlnet = original(cls, *args, **kwargs)
        set_config(controlnet, None)  # it comes with the transformer's configuration, and is not quantized
        given = signature.bind(cls, *args, **kwargs)
        given.apply_defaults()
        if not given.arguments.get("load_weights_from_transformer", True):
            return controlnet
        modules = dict(controlnet.named_modules())
        for name, layer in quantized_layers(given.arguments["transformer"]).items():
            plain = modules.get(name)
            if isinstance(plain, nn.Linear) and (plain.out_features, plain.in_features) == tuple(layer.weight.shape):
                with torch.no_grad():
                    plain.weight.copy_(layer.weight)
        return controlnet

    return from_transformer


def _seeing_weights(original: Callable) -> Callable:
    @functools.wraps(original)
    def maybe_expand_lora_state_dict(cls: type, transformer: nn.Module, lora_state_dict: dict):
        state_dict = transformer.state_dict
        # Views: they know their shapes, which is what is asked for, and decode nothing. Real state dicts hold none, as
        # what writes files would take them for memory.
        views = {f"{name}.weight": layer.weight for name, layer in quantized_layers(transformer).items()}
        transformer.state_dict = lambda: {**state_dict(), **views}
        try:
            return original(cls, transformer, lora_state_dict)
        finally:
            del transformer.state_dict

    return maybe_expand_lora_state_dict


def _warning_where_smoothed(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_lora_adapter(self: nn.Module, *args, **kwargs):
        if is_smoothed(self):
            warnings.warn(
                f"this {type(self).__name__} was smoothed, which scales the inputs of layers: an adapter that was "
                "trained for the model as it was computes on other inputs here, and draws something else",
                stacklevel=2,
            )
        return original(self, *args, **kwargs)

    return load_lora_adapter


def _parting(original: Callable) -> Callable:
    @functools.wraps(original)
    def apply_group_offloading(module: nn.Module, *args, **kwargs):
        part_projections(module)  # joined memory would stay on the device when its layers leave it
        return original(module, *args, **kwargs)

    return apply_group_offloading


def _of_class_before(original: Callable) -> Callable:
    @functools.wraps(original)
    def get(cls: type, model_class: type):
        return original(cls, class_before(model_class))

    return get


def _apply_to_hooks() -> None:
    parting = _parting(hooks.apply_group_offloading)
    hooks.apply_group_offloading = group_offloading.apply_group_offloading = parting
    TransformerBlockRegistry.get = classmethod(_of_class_before(TransformerBlockRegistry.get.__func__))


@functools.cache
def apply() -> None:
    """Replace them; a second call does nothing."""
    peft.teach()
    _apply_to_hooks()
    for cls in (Attention, AttentionModuleMixin):
        cls.fuse_projections = _joining(cls.fuse_projections)
    PeftAdapterMixin.load_lora_adapter = _warning_where_smoothed(PeftAdapterMixin.load_lora_adapter)
    ModelMixin.save_pretrained = saving(ModelMixin.save_pretrained, set_config)
    FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(
        _seeing_weights(FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__)
    )
    for module, name in CONTROLNETS.items():
        cls = getattr(importlib.import_module(module), name, None)  # an older diffusers may lack it
        if cls is not None:
            cls.from_transformer = classmethod(_decoding(cls.from_transformer.__func__))
