"""The analysis as ``report.json`` and as one self-contained page, ``report.html``."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import written_whole
from . import pictures
from .analyze import Analysis
from .statistics import InputStatistics

FORMAT_VERSION = 1
REPORT_FILES = ("report.json", "report.html")
NAMED_CHANNELS = 8


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _input_json(seen: InputStatistics) -> dict[str, Any]:
    outliers = seen.outlier_channels()
    return dict(
        amax_by_step=seen.amax,
        rms_by_step=seen.rms,
        tokens=seen.tokens,
        channel_amax=seen.channel_amax.tolist(),
        channel_rms=seen.channel_rms.tolist(),
        channel_spread=pictures.channel_spread(seen),
        token_spread=pictures.token_spread(seen),
        outlier_channels=outliers,
        lowest=seen.values.lowest,
        median_magnitude=seen.values.quantile(0.5),
        magnitude_99_9=seen.values.quantile(0.999),
        share_rounded_to_zero=seen.share_of_zeros(),
    )


def as_json(analysis: Analysis, about: dict[str, Any]) -> dict[str, Any]:
    """Plain values; ``about``: how the run was made, with versions."""
    observation = analysis.observation
    return dict(
        version=FORMAT_VERSION,
        about=about,
        model=analysis.model,
        steps=observation.steps,
        step=analysis.step,
        schemes=list(analysis.schemes),
        inputs={name: _input_json(seen) for name, seen in observation.inputs.items()},
        not_called=observation.not_called,
        attention={
            name: dict(
                rows=seen.rows,
                mean_largest=seen.largest / seen.rows,
                share_below_half_of_255th=seen.probabilities.share_below(0.5 / 255),
            )
            for name, seen in observation.attention.items()
        },
        weights={name: dataclasses.asdict(found) for name, found in analysis.weights.items()},
        losses={
            name: {
                scheme: dict(snr_db=_finite(loss.snr_db), picture_error=_finite(loss.picture_error))
                for scheme, loss in of_layer.items()
            }
            for name, of_layer in analysis.losses.items()
        },
        plan=analysis.plan.to_dict(),
        exceptions=list(analysis.exceptions),
    )


def _listed(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _drift(seen: InputStatistics) -> float:
    """Largest range of a step over the smallest."""
    ranges = [amax for amax in seen.amax if amax > 0]
    return max(ranges) / min(ranges)


def findings(analysis: Analysis) -> list[str]:
    """What a reader should take away, a sentence each, from the numbers alone."""
    inputs = analysis.observation.inputs
    found = []
    drift = {name: _drift(seen) for name, seen in inputs.items() if max(seen.amax) > 0}
    most = max(drift, key=drift.get)
    found.append(
        f"Over the run the range of a layer's inputs changes by a factor of {statistics.median(drift.values()):.1f} "
        f"(median layer); most in {most}, by {drift[most]:.1f}. Static scales are taken from step {analysis.step}."
    )
    outliers = {name: seen.outlier_channels() for name, seen in inputs.items()}
    with_outliers = sorted((name for name in outliers if outliers[name]), key=lambda name: -len(outliers[name]))
    if with_outliers:
        first = with_outliers[0]
        channels = ", ".join(map(str, outliers[first][:NAMED_CHANNELS]))
        found.append(
            f"{len(with_outliers)} of {len(inputs)} layers are fed outlier channels (over 8 times the median channel's "
            f"range); {first} the most, {len(outliers[first])}: {channels}."
        )
    else:
        found.append("No layer is fed an outlier channel (over 8 times the median channel's range).")
    lost = {name: seen.share_of_zeros() for name, seen in inputs.items()}
    worst = max(lost, key=lost.get)
    found.append(
        f"With one scale for the whole run, int8 rounds {lost[worst]:.0%} of the inputs of {worst} to zero, and "
        f"{statistics.median(lost.values()):.0%} in the median layer."
    )
    gain = statistics.mean(w.group_gain for w in analysis.weights.values())
    found.append(f"A scale per 128 inputs saves {gain:.2f} bits of the weights' range over one per output channel.")
    for scheme in analysis.schemes:
        errors = {
            name: of_layer[scheme].picture_error
            for name, of_layer in analysis.losses.items()
            if scheme in of_layer and of_layer[scheme].picture_error is not None
        }
        if errors:
            first = sorted(errors, key=errors.get, reverse=True)[:3]
            found.append(f"Alone in {scheme}, these move the pictures most: {', '.join(first)}.")
    if analysis.observation.not_called:
        found.append(f"Never called in this run: {_listed(analysis.observation.not_called)}.")
    return found


# (title, what to see in it, the picture)
SECTIONS: tuple[tuple[str, str, Callable[[Analysis], bytes | None]], ...] = (
    (
        "What layers are fed, step by step",
        "A row is a layer, a column a sampling step; the colour is the largest magnitude of the layer's inputs. Rows "
        "that change colour from left to right are those for which one calibrated scale does not fit every step.",
        pictures.draw_ranges,
    ),
    (
        "Channels and tokens that stand out",
        "Activations have one scale per token or one for the layer, never one per channel: a wide channel costs all "
        "others their resolution. A wide token costs the others only where the scale is static.",
        pictures.draw_spreads,
    ),
    (
        "Shapes",
        "Behind a GELU most values are small and few are large, and softmax gives many that int8 cannot tell from "
        "zero. A curve that is wide to the left of its peak loses much to rounding.",
        pictures.draw_shapes,
    ),
    (
        "Weights",
        "Above 1, one scale for the whole layer would waste range; the second bar is what a scale per 128 inputs saves "
        "over one per output channel.",
        pictures.draw_weights,
    ),
    (
        "Noise in each layer's output",
        "Each layer alone in each scheme, on the observed step: the power of its output over that of the error. 6 dB "
        "are one bit. Static ranges are those of the same step and pictures; on others they fit somewhat worse.",
        pictures.draw_snr,
    ),
    (
        "What each layer does to the picture",
        "Each layer alone in each scheme, through the whole run, same seeds: how far the result moves. This, not the "
        "noise, says which layers to treat better.",
        pictures.draw_errors,
    ),
)


def _layer_rows(analysis: Analysis) -> list[list[str]]:
    rows = []
    for name, weight in analysis.weights.items():
        seen = analysis.observation.inputs.get(name)
        cells = [name, f"{weight.in_features} to {weight.out_features}"]
        if seen is None:
            cells += ["not called"] + [""] * 3
        else:
            cells += [
                f"{max(seen.amax):.3g}",
                f"{pictures.channel_spread(seen):.1f}",
                str(len(seen.outlier_channels())),
                f"{seen.share_of_zeros():.0%}",
            ]
        cells += [f"{weight.amax:.3g}", f"{weight.amax / weight.rms:.1f}"]
        cells += [f"{weight.channel_spread:.1f}", f"{weight.group_gain:.2f}"]
        for scheme in analysis.schemes:
            loss = analysis.losses.get(name, {}).get(scheme)
            cells.append("" if loss is None else f"{loss.snr_db:.1f}")
            cells.append("" if loss is None or loss.picture_error is None else f"{100 * loss.picture_error:.2f}")
        rows.append(cells)
    return rows


def _columns(analysis: Analysis) -> list[str]:
    columns = ["layer", "K to N", "largest input", "channel spread", "outlier channels", "static int8: to zero"]
    columns += ["weight: largest", "weight: largest over rms", "weight: channel spread", "weight: bits by groups"]
    for scheme in analysis.schemes:
        columns += [f"{scheme}: SNR, dB", f"{scheme}: picture, %"]
    return columns


def as_html(analysis: Analysis, about: dict[str, Any]) -> str:
    """One page with its pictures in it; opens without a network."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("ditq_kernels.analysis", "."), autoescape=True)
    drawn = [(title, text, draw(analysis)) for title, text, draw in SECTIONS]
    return environment.get_template("report.html.jinja").render(
        title=f"Analysis of {analysis.model}",
        facts=[f"{name}: {value}" for name, value in about.items()],
        findings=findings(analysis),
        sections=[
            dict(title=title, text=text, png=base64.b64encode(png).decode()) for title, text, png in drawn if png
        ],
        plan_scheme=analysis.plan.scheme,
        plan_text=plan_text(analysis),
        plan=[
            dict(
                name=entry.name,
                shape=f"{entry.in_features} to {entry.out_features}",
                scheme=entry.scheme or "16 bits",
                reason=entry.reason,
                exception=entry.name in analysis.exceptions,
            )
            for entry in analysis.plan
        ],
        columns=_columns(analysis),
        layers=_layer_rows(analysis),
    )


def plan_text(analysis: Analysis) -> str:
    """Size and exceptions of the recommended plan, in words."""
    stored = sum(entry.stored_bits for entry in analysis.plan)
    weights = sum(entry.weights for entry in analysis.plan)
    text = f"{stored / weights:.2f} bits per weight over all linear layers, those kept in 16 bits included. "
    if not analysis.exceptions:
        return text + "No layer calls for an exception beyond those of the recipe."
    return text + f"{len(analysis.exceptions)} exceptions to the recipe, highlighted, each with its reason."


def check_target(directory: Path) -> None:
    """Raise FileExistsError if ``directory`` is there already, and ModuleNotFoundError without what draws the page:
    before a long run, not after it.
    """
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401

    if directory.exists():
        raise FileExistsError(f"{directory} exists already; choose another --out, or remove it")


def write(analysis: Analysis, about: dict[str, Any], directory: Path) -> None:
    """Write both files; the directory appears whole or not at all.

    Raises:
        FileExistsError: if ``directory`` is there already.
    """
    check_target(directory)
    with written_whole(directory) as unfinished:
        unfinished.mkdir(parents=True)
        content = json.dumps(as_json(analysis, about), indent=1, allow_nan=False)
        for name, text in zip(REPORT_FILES, (content + "\n", as_html(analysis, about)), strict=True):
            (unfinished / name).write_text(text)
