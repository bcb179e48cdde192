"""What an evaluation found: a table to read, ``results.json``, and two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import written_whole
from .run import Row
from .variants import NOISE_FLOOR

FORMAT_VERSION = 1


def _plain(value: Any) -> Any:
    """With None in place of what JSON has no word for."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row], judge: str | None) -> str:
    """Rows for a terminal; the noise floor is part of it."""
    width = max(len(row.name) for row in rows)
    head = f"{'':{width}}  bits/w   PSNR, dB (95 %)           worst   SSIM  rel. L2  SNR, dB"
    lines = [head + ("  Fréchet  excess (95 %)                score  accuracy" if judge else "")]
    for row in rows:
        low_high = ""
        if row.psnr_interval_db is not None and all(map(math.isfinite, row.psnr_interval_db)):
            low_high = f" ({row.psnr_interval_db[0]:.2f} to {row.psnr_interval_db[1]:.2f})"
        snr = [value for value in (row.layer_snr_db or {}).values() if math.isfinite(value)]
        line = (
            f"{row.name:{width}}  {_text(row.bits_per_weight, '6.2f'):>6}   {_text(row.psnr_db, '.2f') + low_high:24}"
            f"  {_text(row.psnr_worst_db, '.2f'):>5}  {_text(row.ssim, '.3f'):>5}  {_text(row.relative_l2, '.4f'):>7}"
            f"  {_text(sum(snr) / len(snr) if snr else None, '.1f'):>7}"
        )
        if judge:
            excess = _text(row.frechet_excess, "+.4f")
            if row.frechet_excess_interval is not None:
                excess += " ({:+.4f} to {:+.4f})".format(*row.frechet_excess_interval)
            line += (
                f"  {_text(row.frechet, '7.4f'):>7}  {excess:27}  {_text(row.score, '6.3f'):>6}  "
                f"{'-' if row.accuracy is None else format(row.accuracy, '8.1%'):>8}"
            )
        lines.append(line)
    lines += [f"{row.name}: its pictures hold NaN or infinite values" for row in rows if not row.finite]
    lines.append("SNR: of the outputs of the linear layers in one step, their mean.")
    if judge:
        lines.append(
            f"Fréchet distance, score and accuracy: {judge}; distances from the original's other seeds, and by how "
            "much they exceed the original's own."
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Plain values; ``about``: settings and versions."""
    return _plain(dict(version=FORMAT_VERSION, about=about, rows=[asdict(row) for row in rows]))


def write_json(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Write ``path``, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(as_json(rows, about), indent=1, allow_nan=False) + "\n")


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """Relative L2 distance from the original after each sampling step, a curve for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.relative_l2_by_step]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, row in enumerate(shown):
        floor = row.name in {variant.name for variant in NOISE_FLOOR}
        colour = "black" if floor else plt.get_cmap("tab10")(index % 10)
        style = (":" if row.name == NOISE_FLOOR[0].name else "--") if floor else "-"
        steps = range(1, len(row.relative_l2_by_step) + 1)
        axis.plot(steps, row.relative_l2_by_step, label=row.name, color=colour, linestyle=style, linewidth=1.4)
    axis.set_yscale("log")
    axis.set_xlabel("sampling step")
    axis.set_ylabel("relative L2 distance from the original")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Signal-to-noise ratio of each linear layer's output, a line for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.layer_snr_db]
    if not shown:
        return
    names = list(shown[0].layer_snr_db)
    figure, axis = plt.subplots(figsize=(5 + 0.16 * len(names), 6), layout="constrained")
    for index, row in enumerate(shown):
        values = [value if math.isfinite(value) else math.nan for value in map(row.layer_snr_db.get, names)]
        axis.plot(values, label=row.name, color=plt.get_cmap("tab10")(index % 10), marker=".", linewidth=0.8)
    axis.set_xticks(range(len(names)), [name.removeprefix("transformer_") for name in names], rotation=90, fontsize=7)
    axis.set_ylabel("signal-to-noise ratio of the output, dB")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
