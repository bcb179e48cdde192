"""Whole models quantized by this library and by those that a user would pick instead, each through the interface that
its documentation shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

RECOMPILE_LIMIT = 64  # of one class of blocks, of which each contender's is another


@dataclass(frozen=True)
class Contender:
    """One library's way.

    Attributes:
        package: as pip knows it; None of this one.
        convert: a model to its quantized form; it may change the model.
    """

    name: str
    package: str | None
    convert: Callable[[nn.Module], nn.Module]


def ours(model: nn.Module, scheme: str, fused: bool = True) -> nn.Module:
    """In ``scheme``, to nearest; ``fused``: by ``ditq.fuse``."""
    from ..model.pipelines import quantize

    return quantize(model, scheme, fused=fused, progress=False)


def torchao_int8(model: nn.Module) -> nn.Module:
    """int8 weights of torchao's, with activations quantized per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def sdnq_int8(model: nn.Module) -> nn.Module:
    """int8 weights of sdnq's, with its int8 product."""
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(model, weights_dtype="int8", use_quantized_matmul=True, add_skip_keys=False)


def unchanged(model: nn.Module) -> nn.Module:
    """As it is."""
    return model
