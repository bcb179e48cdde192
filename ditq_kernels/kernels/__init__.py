"""Triton kernels behind the ops: raw tensors in and out, the same signatures as :mod:`ditq_kernels.layer.reference`."""

from .activation import gelu_quantize, norm_modulate, norm_modulate_quantize, quantize_activation
from .dispatch import linear_a8, linear_a16
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
