"""Low-bit inference kernels for diffusion transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from .layer.backend import use_backend
from .layer.errors import UnsupportedError
from .layer.formats import SCHEMES, Scheme
from .layer.linear import QuantLinear
from .layer.ops import quantize_activation

if TYPE_CHECKING:
    from .checkpoint.store import CheckpointError, load, save
    from .model.calibration import Calibration, calibrate
    from .model.pipelines import PipelinePlan, fuse, graph, plan, quantize, unfuse, ungraph
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
    "fuse",
    "graph",
    "load",
    "plan",
    "quantize",
    "quantize_activation",
    "saturation",
    "save",
    "smooth",
    "unfuse",
    "ungraph",
    "use_backend",
]

# Layers and ops are there at once; what works on whole models is imported when it is asked for.
_IMPORTED_FROM = {
    **dict.fromkeys(("CheckpointError", "load", "save"), ".checkpoint.store"),
    **dict.fromkeys(("Calibration", "calibrate"), ".model.calibration"),
    **dict.fromkeys(("PipelinePlan", "fuse", "graph", "plan", "quantize", "unfuse", "ungraph"), ".model.pipelines"),
    "PlanEntry": ".model.plan_entry",
    "Plan": ".model.planning",
    **dict.fromkeys(("Saturation", "SaturationWarning", "saturation"), ".model.saturation"),
    "smooth": ".model.smoothing",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_IMPORTED_FROM[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
