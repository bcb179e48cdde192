"""A run's JSON as pictures: speed-up over M for each layer, and the roofline with the ceilings measured in that run.
And the rates of quantizing, and the times of blocks on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from .contenders import BASELINE

SPEEDUP_FILE, ROOFLINE_FILE, RATES_FILE, BLOCKS_FILE = "speedup.png", "roofline.png", "quantizing.png", "cpu_blocks.png"
# The contenders that a picture shows, in the order of its legend: more would hide each other. Colour and marker are
# fixed, so that pictures can be compared; the colours are Okabe and Ito's, which colour-blind readers tell apart.
SHOWN = {
    "cublas_bf16": ("black", "o"),
    "w8a8 product": ("#0072B2", "s"),
    "w8a8": ("#56B4E9", "s"),
    "w4a8_g128 product": ("#009E73", "^"),
    "w8a16_g128": ("#E69F00", "v"),
    "w4a16_g128": ("#D55E00", "D"),
    "scaled_mm fp8 rowwise": ("#CC79A7", "P"),
    "int_mm+scaling compiled": ("#999999", "X"),
}
COLUMNS = 3


def intensity(case: dict[str, Any], record: dict[str, Any]) -> float:
    """Floating-point operations per byte that the product has to move."""
    return 2 * case["rows"] * case["out_features"] * case["in_features"] / record["moved_bytes"]


def _timed(case: dict[str, Any]):
    for record in case["results"]:
        if "tflops" in record and record["contender"] in SHOWN:
            yield record


def _save(figure, path: Path) -> None:
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=130)


def _caption(content: dict[str, Any]) -> str:
    gpu, versions = content["gpu"], content["versions"]
    return f"{gpu.get('name')}, torch {versions.get('torch')}, {str(versions.get('date'))[:10]}"


def _labels(values: list[int]) -> list[str]:
    """Tick labels of ascending ``values`` on a logarithmic axis, blank where one would run into the one before."""
    nearest = math.log2(values[-1] / values[0]) / 8
    labels, last = [], 0.0
    for value in values:
        shown = not last or math.log2(value / last) >= nearest
        labels.append(str(value) if shown else "")
        last = value if shown else last
    return labels


def draw_speedup(content: dict[str, Any], path: Path) -> None:
    """One panel for each (N, K): duration of cuBLAS bf16 over that of each contender, by M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for case in content["cases"]:
        if case["kind"] == "product" and any(record.get("ratio_to_cublas_bf16") for record in case["results"]):
            panels.setdefault((case["out_features"], case["in_features"]), []).append(case)
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns + 0.4, 3.1 * rows + 1.5), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, ((out_features, in_features), cases) in zip(axes.flat, sorted(panels.items()), strict=False):
        cases = sorted(cases, key=lambda case: case["rows"])
        for name, (colour, marker) in SHOWN.items():
            points = [
                (case["rows"], record["ratio_to_cublas_bf16"])
                for case in cases
                for record in _timed(case)
                if record["contender"] == name and record["ratio_to_cublas_bf16"]
            ]
            if points and name != BASELINE:
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.3
                )
        handles[BASELINE] = axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
        values = [case["rows"] for case in cases]
        axis.set_xscale("log", base=2)
        if values[0] == values[-1]:
            axis.set_xlim(values[0] / 2, values[0] * 2)
        axis.set_xticks(values, _labels(values))
        axis.minorticks_off()
        axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
        axis.set_title(f"N={out_features}  K={in_features}", fontsize=10)
        axis.grid(alpha=0.3)
    for index, axis in enumerate(axes.flat):
        if index >= len(panels):
            axis.set_axis_off()
        elif index + columns >= len(panels):
            axis.set_xlabel("M (rows)", fontsize=9)
        if index % columns == 0:
            axis.set_ylabel("speed-up over cuBLAS bf16", fontsize=9)
    figure.suptitle(f"Speed-up by rows, for each layer; {_caption(content)}", fontsize=11)
    shown = [name for name in SHOWN if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=4, fontsize=9)
    _save(figure, path)
    plt.close(figure)


def draw_roofline(content: dict[str, Any], path: Path) -> None:
    """TFLOP/s over operations per byte, under the roofs measured in the same run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    roofs = content["ceilings"]
    points: dict[str, list[tuple[float, float]]] = {}
    for case in content["cases"]:
        if case["kind"] == "product":
            for record in _timed(case):
                point = intensity(case, record), record["tflops"]
                points.setdefault(record["contender"], []).append(point)
    if not roofs or not points:
        return
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    reach = [x for pairs in points.values() for x, _ in pairs]
    low, high = min(reach) / 1.5, max(reach) * 1.5
    slope = roofs["copy_gbs"] * 1e-3  # TFLOP/s per operation and byte
    for (kind, roof), style in zip(sorted(roofs["largest_product"].items()), ("-", "--", ":"), strict=False):
        knee = min(max(roof["tflops"] / slope, low), high)
        axis.plot(
            [low, knee, high],
            [min(low * slope, roof["tflops"]), min(knee * slope, roof["tflops"]), min(high * slope, roof["tflops"])],
            color="0.35",
            linestyle=style,
            linewidth=1.2,
            label=f"{kind} roof: {roof['tflops']:.0f} TFLOP/s ({roof['contender']})",
        )
    for name, (colour, marker) in SHOWN.items():
        if name in points:
            axis.scatter(*zip(*points[name], strict=True), color=colour, marker=marker, s=26, label=name, zorder=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that has to move")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Roofline, copy {roofs['copy_gbs']:.0f} GB/s; {_caption(content)}", fontsize=11)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(fontsize=8, loc="lower right")
    _save(figure, path)
    plt.close(figure)


def draw(content: dict[str, Any], directory: Path) -> list[Path]:
    """Both pictures, as far as there is something to draw; the paths written.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    paths = [directory / SPEEDUP_FILE, directory / ROOFLINE_FILE]
    draw_speedup(content, paths[0])
    draw_roofline(content, paths[1])
    return [path for path in paths if path.exists()]


@dataclass(frozen=True)
class Bar:
    """A value with its quartiles, in the row ``name`` of the panel ``panel``."""

    name: str
    panel: str
    lower: float
    median: float
    upper: float


def _draw_bars(bars: Sequence[Bar], label: str, digits: int, path: Path) -> Path:
    """A panel beside the other, a row for each name, ours in blue."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, names = (list(dict.fromkeys(getattr(bar, of) for bar in bars)) for of in ("panel", "name"))
    size = (4.2 * len(panels) + 1.6, 0.34 * len(names) + 1.3)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for bar in (bar for bar in bars if bar.panel == panel):
            place = names.index(bar.name)
            whiskers = [[bar.median - bar.lower], [bar.upper - bar.median]]
            colour = "#0072B2" if bar.name.startswith("ditq_kernels") else "#999999"
            axis.barh(place, bar.median, xerr=whiskers, color=colour, ecolor="black", capsize=2)
            axis.text(bar.upper, place, f" {bar.median:.{digits}f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(0, 1.18 * axis.get_xlim()[1])
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    _save(figure, path)
    plt.close(figure)
    return path


def draw_rates(rates: Sequence[Any], directory: Path) -> Path:
    """Bars of million weights a second, of :class:`.quantizing.Rate`, a panel for each layer, with quartiles."""
    bars = [
        Bar(rate.name, "N={}  K={}".format(*rate.shape), rate.lower, rate.median, rate.upper)
        for rate in rates
        if rate.median
    ]
    return _draw_bars(bars, "million weights a second", 0, directory / RATES_FILE)


def draw_timings(timings: Sequence[Any], directory: Path) -> Path:
    """Bars of milliseconds, of :class:`.cpu_blocks.Timing`, a panel for each block, eager and compiled, with
    quartiles.
    """
    bars = [
        Bar(
            timing.name,
            f"{timing.subject}\n{'compiled' if timing.compiled else 'eager'}",
            timing.lower,
            timing.median,
            timing.upper,
        )
        for timing in timings
        if timing.median
    ]
    return _draw_bars(bars, "milliseconds: shorter is faster", 1, directory / BLOCKS_FILE)
