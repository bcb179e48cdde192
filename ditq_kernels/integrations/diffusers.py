"""diffusers with quantized models of ours.

Importing this is the one import of the package with an effect: diffusers' own ``from_pretrained`` and
``save_pretrained`` know quantized models from then on (``quantization_config=DitqConfig("w4a8_g128")``), as do
transformers' for text encoders, and three functions of diffusers are replaced (:mod:`.patches`).
"""

from __future__ import annotations

import importlib.util
import warnings

from . import patches
from .config import DitqConfig
from .quantizer import DitqQuantizer, attach, register

__all__ = ["DitqConfig", "DitqQuantizer", "attach"]

register()
patches.apply()
if importlib.util.find_spec("transformers") is not None:
    try:
        from . import transformers  # noqa: F401 (its import registers it)
    except ImportError as error:
        warnings.warn(f"text encoders will not be loaded quantized: {error}; transformers 5 is needed", stacklevel=2)
