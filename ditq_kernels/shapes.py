"""Linear layers of real models: their shapes in one literal table. What is measured or counted reads it, and tests do.

Sources: the models' public configurations, as diffusers instantiates them, for one picture with guidance batched where
the pipeline batches it.
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLES = (1, 2, 4, 8, 16)  # rows of a modulation layer: one per sample


@dataclass(frozen=True)
class Layer:
    """Some linear layers of one model that have the same shape.

    Attributes:
        model: its name, a value of :data:`MODELS`.
        role: what the layers do; names are unique within a model.
        out_features, in_features: N and K.
        rows: the values of M that the model gives them.
        modulation: whether a row is a sample and not a token; such layers take 16-bit activations in every scheme.
    """

    model: str
    role: str
    out_features: int
    in_features: int
    rows: tuple[int, ...]
    modulation: bool = False


# fmt: off
LAYERS = (
    Layer("DiT-XL/2 256px", "attention", 1152, 1152, (512,)),
    Layer("DiT-XL/2 256px", "mlp up", 4608, 1152, (512,)),
    Layer("DiT-XL/2 256px", "mlp down", 1152, 4608, (512,)),
    Layer("DiT-XL/2 256px", "modulation", 6912, 1152, SAMPLES, modulation=True),
    Layer("DiT-XL/2 512px", "attention", 1152, 1152, (2048,)),
    Layer("DiT-XL/2 512px", "mlp up", 4608, 1152, (2048,)),
    Layer("DiT-XL/2 512px", "mlp down", 1152, 4608, (2048,)),
    Layer("DiT-XL/2 512px", "modulation", 6912, 1152, SAMPLES, modulation=True),
    Layer("DiT-B/2", "attention", 768, 768, (512, 2048)),
    Layer("DiT-B/2", "mlp up", 3072, 768, (512, 2048)),
    Layer("DiT-B/2", "mlp down", 768, 3072, (512, 2048)),
    Layer("DiT-B/2", "modulation", 4608, 768, SAMPLES, modulation=True),
    Layer("PixArt-Sigma", "attention", 1152, 1152, (8192,)),
    Layer("PixArt-Sigma", "cross k/v", 1152, 1152, (240, 600)),
    Layer("PixArt-Sigma", "mlp up", 4608, 1152, (8192,)),
    Layer("PixArt-Sigma", "mlp down", 1152, 4608, (8192,)),
    Layer("PixArt-Sigma", "modulation", 6912, 1152, SAMPLES, modulation=True),
    Layer("SD3-medium", "attention", 1536, 1536, (8192, 666)),
    Layer("SD3-medium", "mlp up", 6144, 1536, (8192, 666)),
    Layer("SD3-medium", "mlp down", 1536, 6144, (8192, 666)),
    Layer("SD3-medium", "modulation", 9216, 1536, SAMPLES, modulation=True),
    Layer("FLUX.1", "attention", 3072, 3072, (4096, 512, 4608)),
    Layer("FLUX.1", "mlp up", 12288, 3072, (4096, 512, 4608)),
    Layer("FLUX.1", "mlp down", 3072, 12288, (4096, 512)),
    Layer("FLUX.1", "single proj_out", 3072, 15360, (4608,)),
    Layer("FLUX.1", "modulation", 18432, 3072, SAMPLES, modulation=True),
    Layer("FLUX.1", "single modulation", 9216, 3072, SAMPLES, modulation=True),
)
# fmt: on
MODELS = tuple(dict.fromkeys(layer.model for layer in LAYERS))
