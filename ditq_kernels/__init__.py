"""Low-bit inference kernels for diffusion transformers."""

from .formats import SCHEMES, Scheme
from .linear import QuantLinear
from .ops import UnsupportedError, quantize_activation, use_backend

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "QuantLinear",
    "Scheme",
    "UnsupportedError",
    "quantize_activation",
    "use_backend",
]
