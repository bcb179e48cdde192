"""Plots of the experiments' page, from their records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .records import Records
from .tables import over_sets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110


def _mean(rows: Iterable) -> float:
    return float(over_sets(rows).mean())


def _axes(width: float = 7.5, height: float = 4.5) -> Axes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.grid(alpha=0.3)
    axis.set_ylabel("PSNR to the original, dB")
    return axis


def _save(axis: Axes, path: Path) -> None:
    import matplotlib.pyplot as plt

    axis.figure.legend(loc="outside right upper", fontsize=8)
    axis.figure.savefig(path, dpi=DPI)
    plt.close(axis.figure)


def _by_position(axis: Axes, records: Records, label: str, colour: str, **facts: object) -> None:
    """The mean over sets of one step, a dot for each set, and all steps as a dashed line."""
    rows = [row for row in records.all(**facts) if len(row.get("sets") or [0]) == 1]
    steps = sorted({row["step"] for row in rows if row["step"] != "all"})
    axis.plot(
        steps,
        [_mean(row for row in rows if row["step"] == step) for step in steps],
        color=colour,
        label=f"{label} one step",
    )
    single = [row for row in rows if row["step"] != "all"]
    axis.plot([row["step"] for row in single], [_mean([row]) for row in single], ".", color=colour, alpha=0.5)
    every = [row for row in rows if row["step"] == "all"]
    axis.axhline(_mean(every), color=colour, linestyle="--", linewidth=1, label=f"{label} all steps")


def calibration(records: Records, path: Path) -> None:
    axis = _axes()
    _by_position(axis, records, "static,", "tab:blue", ranges="static", percentile=None)
    axis.axhline(_mean(records.all(ranges="dynamic")), color="black", linewidth=1, label="per token, at run time")
    axis.set_xlabel("position of the calibrated step in the run (w8a8_static)")
    _save(axis, path)


def moments(records: Records, path: Path) -> None:
    axis = _axes()
    _by_position(axis, records, "compensated,", "tab:orange", rounding="compensated", pictures=10)
    axis.axhline(_mean(records.all(rounding="nearest")), color="black", linewidth=1, label="to nearest")
    axis.set_xlabel("position of the step whose moments are taken (4-bit weights, groups of 128)")
    _save(axis, path)


def weights(records: Records, path: Path) -> None:
    axis = _axes(8.5, 5)
    for index, bits in enumerate((3, 4, 6, 8)):
        for compensated, style in ((False, "o-"), (True, "s--")):
            rule = "symmetric" if bits == 8 else "eighth_level"
            asked = dict(bits=bits, two_level=False, zero_point=rule, clip=None, compensated=compensated)
            rows = sorted(records.all(**asked), key=lambda row: row["bits_per_weight"])
            name = f"{bits} bits, {'compensated' if compensated else 'to nearest'}"
            if rows:
                points = [row["bits_per_weight"] for row in rows], [_mean([row]) for row in rows]
                axis.plot(*points, style, color=f"C{index}", label=name, markersize=4, linewidth=1)
    for compensated, marker in ((False, "*"), (True, "P")):
        asked = dict(bits=4, two_level=True, zero_point="best", clip=None, compensated=compensated)
        rows = list(records.all(**asked))
        name = f"one byte a group, {'compensated' if compensated else 'to nearest'}"
        points = [row["bits_per_weight"] for row in rows], [_mean([row]) for row in rows]
        axis.plot(*points, marker, color="black", label=name, markersize=7)
    axis.set_xlabel("bits per weight, scales included (weights alone; per channel, groups of 128, 64, 32)")
    _save(axis, path)


def budgets(records: Records, path: Path) -> None:
    axis = _axes()
    for rounding, style, marker in (("nearest", "-", "ko"), ("compensated", "--", "ks")):
        rows = sorted(
            (row for row in records.all(remedy="budget", rounding=rounding) if row.get("uniform")),
            key=lambda row: row["bits_per_weight"],
        )
        points = [row["bits_per_weight"] for row in rows], [_mean([row]) for row in rows]
        axis.plot(*points, marker, markersize=4, label=f"one format, {rounding}")  # nothing lies between them
        for index, errors in enumerate(("weights", "outputs", "pictures")):
            rows = list(records.all(remedy="budget", rounding=rounding, errors=errors))
            points = [row["bits_per_weight"] for row in rows], [_mean([row]) for row in rows]
            axis.plot(
                *points, style, color=f"C{index}", marker=".", label=f"by noise of {errors}, {rounding}", linewidth=1
            )
    axis.set_xlabel("bits per weight, scales included (weights alone)")
    _save(axis, path)


def peers(records: Records, path: Path) -> None:
    axis = _axes(8.5, 5)
    for index, package in enumerate(dict.fromkeys(row["package"] for row in records.rows)):
        rows = list(records.all(package=package))
        points = [row["bits_per_weight"] for row in rows], [_mean([row]) for row in rows]
        axis.plot(*points, "*" if package == "ditq_kernels" else "o", color=f"C{index}", label=package)
    axis.set_xlim(4, 4.6)
    few = [_mean([row]) for row in records.rows if row["bits_per_weight"] < 4.6]
    axis.set_ylim(min(few) - 1, max(few) + 1)
    axis.set_xlabel("bits per weight, scales included (4-bit formats)")
    _save(axis, path)


PLOTS = dict(
    calibration=calibration, moments=moments, weights=weights, remedies=budgets, peers=peers
)  # by the experiment whose records they show
