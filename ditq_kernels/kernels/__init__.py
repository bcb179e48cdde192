"""Triton kernels behind the ops: raw tensors in and out, the same signatures as :mod:`ditq_kernels.reference`."""

from .activation import quantize_activation
from .gradient import grad_input
from .product import linear_a8, linear_a16

__all__ = ["grad_input", "linear_a8", "linear_a16", "quantize_activation"]
