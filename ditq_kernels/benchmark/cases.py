"""The products that are measured, of the layers in :mod:`~ditq_kernels.shapes`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ..shapes import LAYERS, MODELS


@dataclass(frozen=True)
class Case:
    """One product, and the layers it stands for.

    Attributes:
        rows, out_features, in_features: M, N and K.
        modulation: as in :class:`~ditq_kernels.shapes.Layer`.
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
