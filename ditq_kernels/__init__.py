"""Low-bit inference kernels for diffusion transformers."""

from .checkpoint.store import CheckpointError, load, save
from .layer.backend import use_backend
from .layer.errors import UnsupportedError
from .layer.formats import SCHEMES, Scheme
from .layer.linear import QuantLinear
from .layer.ops import quantize_activation
from .model.calibration import Calibration, calibrate
from .model.pipelines import PipelinePlan, plan, quantize
from .model.plan_entry import PlanEntry
from .model.planning import Plan
from .model.saturation import Saturation, SaturationWarning, saturation
from .model.smoothing import smooth

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Calibration",
    "CheckpointError",
    "PipelinePlan",
    "Plan",
    "PlanEntry",
    "QuantLinear",
    "Saturation",
    "SaturationWarning",
    "Scheme",
    "UnsupportedError",
    "calibrate",
    "load",
    "plan",
    "quantize",
    "quantize_activation",
    "saturation",
    "save",
    "smooth",
    "use_backend",
]
