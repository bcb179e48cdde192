"""The analysis as pictures: each function draws one figure, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .analyze import Analysis
from .statistics import BINS, BINS_PER_OCTAVE, InputStatistics, edge

ROW_INCHES = 0.17  # of a figure with a row per layer
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d5a97", "#444444")
ONE_SIDED_ABOVE = -0.36  # GELU and SiLU give nothing below -0.28; a histogram's bin reaches a little further
MOST_CURVES = 12
FINITE_DB = 100.0
LARGEST_ERROR = 2.0  # pictures that have nothing in common differ by less
SHOWN_OCTAVES = 16  # below 1 in the pictures of shapes


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def _rows(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def draw_ranges(analysis: Analysis) -> bytes:
    """Heat map: the largest magnitude that each layer is fed, in each step."""
    from matplotlib.colors import LogNorm

    inputs, steps = analysis.observation.inputs, analysis.observation.steps
    values = [[*seen.amax, *[0.0] * (steps - len(seen.amax))] for seen in inputs.values()]
    grid = torch.tensor(values).clamp(min=1e-6)
    figure, axis = _figure(9, 1.4 + ROW_INCHES * len(inputs))
    image = axis.imshow(grid, aspect="auto", cmap="magma", norm=LogNorm(), interpolation="nearest")
    _rows(axis, list(inputs))
    axis.grid(visible=False)
    axis.axvline(analysis.step, color="white", linewidth=0.8, linestyle="--")
    axis.set_xlabel(
        "sampling step, from noise to picture (dashed: the step that static scales are taken from)", fontsize=8
    )
    figure.colorbar(image, label="largest magnitude", shrink=min(1.0, 3 / (ROW_INCHES * len(inputs)) + 0.2))
    return _png(figure)


def _bars(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, log: bool = False) -> bytes:
    """Horizontal bars, a group for each layer."""
    figure, axis = _figure(9, 1.4 + ROW_INCHES * len(names) * max(1.0, 0.6 * len(series)))
    thickness = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        at = [row - 0.4 + thickness * (index + 0.5) for row in range(len(names))]
        axis.barh(at, values, thickness, label=name, color=COLOURS[index % len(COLOURS)])
    _rows(axis, names)
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(label, fontsize=8)
    if len(series) > 1:
        figure.legend(fontsize=8, loc="outside upper center", ncols=len(series))
    return _png(figure)


def channel_spread(seen: InputStatistics) -> float:
    """Largest magnitude of the widest input channel over the median channel's; channels of zeros left out."""
    filled = seen.channel_amax[seen.channel_amax > 0]
    return float(filled.max() / filled.median()) if len(filled) else 1.0


def token_spread(seen: InputStatistics) -> float:
    """Largest magnitude of the widest rows (99.9 %) over the median row's."""
    median = seen.token_amax.quantile(0.5)
    return seen.token_amax.quantile(0.999) / median


def draw_spreads(analysis: Analysis) -> bytes:
    """By layer: how much wider the widest channel, and the widest token, is than the median one."""
    inputs = analysis.observation.inputs
    series = {
        "widest channel over the median channel": [channel_spread(seen) for seen in inputs.values()],
        "widest token (99.9 %) over the median token": [token_spread(seen) for seen in inputs.values()],
    }
    return _bars(list(inputs), series, "ratio of largest magnitudes (logarithmic)", log=True)


def draw_weights(analysis: Analysis) -> bytes:
    """By layer: the spread over channels, and what groups gain."""
    series = {
        "widest output channel over the median one": [w.channel_spread for w in analysis.weights.values()],
        "bits that a scale per group saves": [w.group_gain for w in analysis.weights.values()],
    }
    return _bars(list(analysis.weights), series, "ratio, and bits")


def draw_snr(analysis: Analysis) -> bytes:
    """By layer and scheme: signal-to-noise ratio of its output."""
    return _loss_bars(
        analysis, lambda loss: min(max(loss.snr_db, 0.0), FINITE_DB), "signal-to-noise ratio of the output, dB"
    )


def draw_errors(analysis: Analysis) -> bytes | None:
    """By layer and scheme: how far the picture moves when it alone is quantized; None if that was not drawn."""
    if all(loss.picture_error is None for losses in analysis.losses.values() for loss in losses.values()):
        return None
    return _loss_bars(
        analysis,
        lambda loss: _shown_error(loss.picture_error),
        "relative L2 distance of the final pictures (logarithmic)",
        log=True,
    )


def _shown_error(error: float | None) -> float:
    return math.nan if error is None else min(error, LARGEST_ERROR)


def _loss_bars(analysis: Analysis, value: Callable, label: str, log: bool = False) -> bytes:
    names = list(analysis.losses)
    series = {
        scheme: [
            value(analysis.losses[name][scheme]) if scheme in analysis.losses[name] else math.nan for name in names
        ]
        for scheme in analysis.schemes
    }
    return _bars(names, series, label, log)


def one_sided(analysis: Analysis) -> dict[str, InputStatistics]:
    """Layers that are fed what a GELU or SiLU gives, by the values themselves."""
    return {
        name: seen
        for name, seen in analysis.observation.inputs.items()
        if seen.values.lowest >= ONE_SIDED_ABOVE and max(seen.amax) > 1
    }


def draw_shapes(analysis: Analysis) -> bytes:
    """How values are distributed: behind GELU or SiLU, in all other inputs, and attention probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sided = one_sided(analysis)
    others = {name: seen for name, seen in analysis.observation.inputs.items() if name not in sided}
    panels = {
        "inputs behind GELU or SiLU": {name: seen.values for name, seen in sided.items()},
        "other inputs": {name: seen.values for name, seen in others.items()},
        "attention probabilities": {name: seen.probabilities for name, seen in analysis.observation.attention.items()},
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    figure, axes = plt.subplots(len(panels), figsize=(9.5, 2.9 * len(panels)), squeeze=False, layout="constrained")
    edges = torch.tensor([edge(index) for index in range(BINS)])
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        names = list(curves)[:: max(1, math.ceil(len(curves) / MOST_CURVES))]
        for index, name in enumerate(names):
            counts = (curves[name].positive + curves[name].negative).double() / max(curves[name].count, 1)
            colour = plt.get_cmap("viridis")(index / max(1, len(names) - 1))
            held = torch.nonzero(counts).flatten()
            if len(held):
                span = slice(int(held[0]), int(held[-1]) + 1)
                axis.plot(edges[span], counts[span] * BINS_PER_OCTAVE, color=colour, linewidth=1, label=name)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{title} ({len(names)} of {len(curves)})" if len(names) < len(curves) else title, fontsize=9)
        axis.set_xlabel("magnitude", fontsize=8)
        axis.set_ylabel("share of the values per octave", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_xlim(2.0**-SHOWN_OCTAVES, None)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    return _png(figure)
