"""The layers that are measured: real shapes in one literal table. Tests read it too.

Sources of the shapes: the models' public configurations, as diffusers instantiates them, for one picture with guidance
batched where the pipeline batches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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


@dataclass(frozen=True)
class Case:
    """One product, and the layers it stands for.

    Attributes:
        rows, out_features, in_features: M, N and K.
        modulation: as in :class:`Layer`.
        layers: "model role" of each layer with this shape; empty for shapes that no listed model has.
    """

    rows: int
    out_features: int
    in_features: int
    modulation: bool = False
    layers: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.out_features, self.in_features

    @property
    def flops(self) -> int:
        """Floating-point operations of the product."""
        return 2 * self.rows * self.out_features * self.in_features

    def __str__(self) -> str:
        return f"M={self.rows} N={self.out_features} K={self.in_features}"


# Shapes whose speeds the project has set itself as targets (:mod:`.targets`), the most telling first. Square ones with
# few rows belong to no model in the table: they show where decoding weights turns from a gain into a cost.
TARGET_SHAPES = (
    (4096, 3072, 3072),
    (2048, 1152, 1152),
    (2048, 4608, 1152),
    (2048, 1152, 4608),
    (512, 1152, 1152),
    (512, 4608, 1152),
    (512, 1152, 4608),
    (16, 18432, 3072),
    (1, 18432, 3072),
    (4, 18432, 3072),
    (16, 6912, 1152),
    (1, 6912, 1152),
    (4, 6912, 1152),
    (256, 3072, 3072),
    (64, 3072, 3072),
    (4096, 12288, 3072),
)


def _named(rows: int, out_features: int, in_features: int) -> Case:
    layers = tuple(
        f"{layer.model} {layer.role}"
        for layer in LAYERS
        if (layer.out_features, layer.in_features) == (out_features, in_features) and rows in layer.rows
    )
    modulation = any(
        layer.modulation and (layer.out_features, layer.in_features) == (out_features, in_features) for layer in LAYERS
    )
    return Case(rows, out_features, in_features, modulation, layers)


def target_cases() -> tuple[Case, ...]:
    """The quick selection: what the targets are judged by."""
    return tuple(_named(*shape) for shape in TARGET_SHAPES)


def find_models(name: str) -> tuple[str, ...]:
    """The models whose names begin with ``name``, in any case of letters.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    found = tuple(model for model in MODELS if model.lower().startswith(name.lower()))
    if not found:
        raise ValueError(f"unknown model {name!r}; the table of cases has {', '.join(MODELS)}")
    return found


def model_cases(models: Iterable[str] = MODELS) -> tuple[Case, ...]:
    """The distinct products of ``models``, in the table's order.

    Raises:
        ValueError: for a model that the table does not have, naming those that it has.
    """
    models = tuple(model for name in models for model in find_models(name))
    shapes = (
        (rows, layer.out_features, layer.in_features)
        for model in models
        for layer in LAYERS
        if layer.model == model
        for rows in layer.rows
    )
    return tuple(_named(*shape) for shape in dict.fromkeys(shapes))


def select(models: Iterable[str] | None = None, rows: Iterable[int] | None = None, quick: bool = False) -> list[Case]:
    """Cases in the order in which to measure them: the targets' shapes, then those of ``models`` (default: all).

    Args:
        models: with models named, only their shapes are taken, the targets' among them first.
        rows: keep these values of M only.
        quick: the targets' shapes only.

    Raises:
        ValueError: for an unknown model.
    """
    of_models = model_cases(MODELS if models is None else models)
    targets = target_cases()
    if models is not None:
        targets = tuple(case for case in targets if case in of_models)
    chosen = dict.fromkeys(targets if quick else itertools.chain(targets, of_models))
    wanted = None if rows is None else set(rows)
    return [case for case in chosen if wanted is None or case.rows in wanted]
