"""The backend ``cuda``: products by the CUDA extension, all else by the Triton kernels, which it does not replace."""

from __future__ import annotations

import torch

from ..layer import extension
from ..layer.errors import UnsupportedError
from ..layer.gated_residual import GatedResidual
from ..layer.packed_weight import PackedWeight
from .activation import gelu_quantize, norm_modulate, norm_modulate_quantize, quantize_activation
from .device import describe
from .gradient import grad_input
from .heads import attention_inputs

__all__ = [
    "attention_inputs",
    "gelu_quantize",
    "grad_input",
    "linear_a8",
    "linear_a16",
    "norm_modulate",
    "norm_modulate_quantize",
    "quantize_activation",
]


def _refuse(reason: str | None) -> None:
    if reason:
        raise UnsupportedError(f"backend 'cuda' lacks this product: {reason}; use triton")


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    added: GatedResidual | None = None,
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.linear_a8`.

    Raises:
        UnsupportedError: for what :func:`ditq_kernels.layer.extension.why_unsupported_a8` names.
    """
    shape = (qx.shape[0], weight.out_features, weight.in_features)
    _refuse(extension.why_unsupported_a8(*shape, weight.fmt, out_dtype, describe(qx.device).capability))
    y = extension.linear_a8(qx, sx, weight, bias, out_dtype)
    return y if added is None else added.plus(y)


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.linear_a16`.

    Raises:
        UnsupportedError: for what :func:`ditq_kernels.layer.extension.why_unsupported_a16` names.
    """
    shape = (x.shape[0], weight.out_features, weight.in_features)
    _refuse(extension.why_unsupported_a16(*shape, weight.fmt, x.dtype, describe(x.device).capability))
    return extension.linear_a16(x, weight, bias, silu)
