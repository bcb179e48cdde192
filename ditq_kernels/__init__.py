"""Low-bit inference kernels for diffusion transformers."""

from .backend import use_backend
from .calibration import Calibration, calibrate
from .checkpoint import CheckpointError, load, save
from .conversion import quantize
from .errors import UnsupportedError
from .formats import SCHEMES, Scheme
from .linear import QuantLinear
from .ops import quantize_activation
from .planning import Plan, PlanEntry, plan
from .smoothing import smooth

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Calibration",
    "CheckpointError",
    "Plan",
    "PlanEntry",
    "QuantLinear",
    "Scheme",
    "UnsupportedError",
    "calibrate",
    "load",
    "plan",
    "quantize",
    "quantize_activation",
    "save",
    "smooth",
    "use_backend",
]
