"""The ops on CPU tensors: those of int8 activations and of few rows by the extension for CPUs, others as the reference
does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu_extension, reference
from .gated_residual import GatedResidual
from .packed_weight import PackedWeight
from .reference import attention_inputs, grad_input, norm_modulate

__all__ = [
    "attention_inputs",
    "gelu_quantize",
    "grad_input",
    "linear_a8",
    "linear_a16",
    "norm_modulate",
    "norm_modulate_quantize",
    "quantize_activation",
    "quantized_linear",
]


def quantize_activation(x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.reference.quantize_activation`, bit for bit."""
    implementation = cpu_extension if x.numel() else reference
    return implementation.quantize_activation(x, amax)


def gelu_quantize(
    x: torch.Tensor,
    amax: torch.Tensor | None = None,
    approximate: str = "none",
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.reference.gelu_quantize`, with tanh up to the rounding of exponentials."""
    if approximate == "tanh" and x.numel() and before is None:
        return cpu_extension.gelu_quantize(x, amax)
    y = F.gelu(x.to(torch.float32), approximate=approximate)
    return quantize_activation(y if before is None else torch.cat([before.to(torch.float32), y], 1), amax)


def norm_modulate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.reference.norm_modulate_quantize`, up to the order of sums."""
    implementation = cpu_extension if x.numel() else reference
    return implementation.norm_modulate_quantize(x, weight, bias, shift, scale, amax, eps)


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    added: GatedResidual | None = None,
) -> torch.Tensor:
    """As :func:`.reference.linear_a8`, bit for bit."""
    if qx.numel() and weight.out_features and out_dtype in cpu_extension.OUTPUT_DTYPES:
        return cpu_extension.linear_a8(qx, sx, weight, bias, out_dtype, added)
    y = reference.linear_a8(qx, sx, weight, bias, out_dtype)
    return y if added is None else added.plus(y)  # a residual in fp64 stays so


def quantized_linear(
    x: torch.Tensor, amax: torch.Tensor | None, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """As :func:`.reference.quantized_linear`, bit for bit."""
    there = x.numel() and weight.out_features and x.dtype in cpu_extension.ACTIVATION_DTYPES
    implementation = cpu_extension if there else reference
    return implementation.quantized_linear(x, amax, weight, bias)


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
) -> torch.Tensor:
    """As :func:`.reference.linear_a16`, up to the order of sums; bit for bit where the rows are many."""
    few = x.shape[0] <= cpu_extension.FEW_ROWS and x.numel() and weight.out_features
    if few and x.dtype in cpu_extension.ACTIVATION_DTYPES:
        found = cpu_extension.linear_a16(x, weight, bias, silu)
        if found is not None:
            return found
    return reference.linear_a16(x, weight, bias, silu)
