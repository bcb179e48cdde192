"""Tables of the experiments' page, from their records. A number is a mean over pictures, with a 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...evaluation.metrics import interval
from .records import Records

Row = Mapping[str, Any]
OURS = "w4a16_g128, compensated"


def over_sets(rows: Iterable[Row]) -> torch.Tensor:
    """PSNR of each picture, dB, averaged over ``rows`` of the same pictures."""
    return torch.tensor([row["psnr_db"] for row in rows]).mean(0)


def shown(values: torch.Tensor, sign: bool = False) -> str:
    """``mean (low to high)``."""
    low, high = interval(values)
    form = "+.1f" if sign else ".1f"
    return f"{float(values.mean()):{form}} ({low:{form}} to {high:{form}})"


def gain(rows: Iterable[Row], base: Iterable[Row]) -> str:
    """The difference of PSNR on the same pictures."""
    return shown(over_sets(rows) - over_sets(base), sign=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _step(step: float | str | None) -> str:
    return "-" if step is None else "all" if step == "all" else f"{step:.1f}"


def calibration(records: Records) -> str:
    (dynamic,) = records.all(ranges="dynamic")
    lines = [("per token, at run time", "-", "-", 0, shown(over_sets([dynamic])))]
    seen = []
    for row in records.all(ranges="static"):
        key = row["step"], row["percentile"]
        if key in seen:
            continue
        seen.append(key)
        rows = list(records.all(ranges="static", step=row["step"], percentile=row["percentile"]))
        percentile = f"{row['percentile']} %" if row["percentile"] else "min-max"
        lines.append((f"static, from {len(rows)} sets", _step(row["step"]), percentile, row["passes"], _by_set(rows)))
    return markdown(("ranges", "step", "range", "forward passes", "PSNR dB"), lines)


def _by_set(rows: Sequence[Row]) -> str:
    each = ", ".join(f"{float(over_sets([row]).mean()):.1f}" for row in rows)
    return f"{shown(over_sets(rows))}; {each}" if len(rows) > 1 else shown(over_sets(rows))


def weights(records: Records) -> str:
    """Bits and groups, with float scales."""
    lines = []
    for bits in (8, 6, 4, 3):
        for group in (None, 128, 64, 32):
            rule = "symmetric" if bits == 8 else "eighth_level"
            plain = dict(bits=bits, group=group, zero_point=rule, two_level=False, clip=None)
            cells = [shown(over_sets([row])) for c in (False, True) if (row := records.find(**plain, compensated=c))]
            row = records.find(**plain)
            lines.append((bits, group or "channel", f"{row['bits_per_weight']:.2f}", *cells, *["-"] * (2 - len(cells))))
    return markdown(("bits", "group", "bits per weight", "to nearest, dB", "compensated, dB"), lines)


def rules(records: Records) -> str:
    """4 bits in two levels: where the levels lie."""
    lines = []
    for group in (None, 128, 64, 32):
        for compensated in (False, True):
            plain = dict(bits=4, group=group, two_level=True, compensated=compensated)
            base = records.find(**plain, zero_point="eighth_level", clip=None)
            others = [
                records.find(**plain, zero_point=rule, clip=clip)
                for rule, clip in (("symmetric", None), ("free", None), ("best", None), ("eighth_level", "search"))
            ]
            name = f"{group or 'channel'}, {'compensated' if compensated else 'to nearest'}"
            lines.append((name, shown(over_sets([base])), *(gain([row], [base]) for row in others)))
    header = ("group", "eighth level", "symmetric", "free zero point", "best of the two", "eighth level, clip search")
    return markdown(header, lines)


def levels(records: Records) -> str:
    """One byte for a group against a float scale."""
    lines = []
    for group in (128, 64, 32):
        for compensated in (False, True):
            plain = dict(bits=4, group=group, zero_point="eighth_level", clip=None, compensated=compensated)
            floats, bytes_ = (records.find(**plain, two_level=two_level) for two_level in (False, True))
            lines.append(
                (
                    f"{group}, {'compensated' if compensated else 'to nearest'}",
                    f"{floats['bits_per_weight']:.2f}",
                    shown(over_sets([floats])),
                    f"{bytes_['bits_per_weight']:.2f}",
                    gain([bytes_], [floats]),
                )
            )
    return markdown(("group", "bits, float", "float scales, dB", "bits, one byte", "one byte, gain"), lines)


def clipping(records: Records) -> str:
    """What clip search does to weights, outputs and pictures."""
    lines = []
    for name, clip, compensated, restored in (
        ("whole range", None, False, False),
        ("whole range, gain restored", None, False, True),
        ("clip search", "search", False, False),
        ("clip search, gain restored", "search", False, True),
        ("clipped to 0.9", 0.9, False, False),
        ("whole range, compensated", None, True, False),
        ("whole range, compensated, gain restored", None, True, True),
        ("clip search, compensated", "search", True, False),
        ("clip search, compensated, gain restored", "search", True, True),
    ):
        plain = dict(bits=4, group=128, two_level=True, zero_point="eighth_level", compensated=compensated)
        row = records.find(**plain, clip=clip, gain_restored=restored)
        base = records.find(**plain, clip=None, gain_restored=False)
        numbers = f"{row['weight_snr_db']:.1f}", f"{row['output_snr_db']:.1f}", f"{row['output_gain']:+.2%}"
        change = "-" if row is base else gain([row], [base])
        lines.append((name, *numbers, shown(over_sets([row])), change))
    header = ("", "SNR of weights, dB", "SNR of outputs, dB", "gain of outputs", "PSNR dB", "against the whole range")
    return markdown(header, lines)


def moments(records: Records) -> str:
    (nearest,) = records.all(rounding="nearest")
    lines = [("to nearest", "-", "-", shown(over_sets([nearest])), "-")]
    for step in dict.fromkeys(row["step"] for row in records.all(rounding="compensated")):
        rows = [row for row in records.all(rounding="compensated", step=step, pictures=10) if len(row["sets"]) == 1]
        lines.append(("compensated, 3 sets", _step(step), 10, _by_set(rows), gain(rows, [nearest])))
    for row in records.all(rounding="compensated"):
        if len(row["sets"]) > 1:
            lines.append(("of three runs together", _step(row["step"]), 30, _by_set([row]), gain([row], [nearest])))
    for pictures in (1, 2, 5, 10, 20, 50):
        rows = [row for row in records.all(step=0.5, pictures=pictures) if len(row["sets"]) == 1]
        lines.append(("compensated, 3 sets", "0.5", pictures, _by_set(rows), gain(rows, [nearest])))
    return markdown(("rounding", "step", "pictures", "PSNR dB; by set", "gain, dB"), lines)


def positions(records: Records) -> str:
    steps = dict.fromkeys(row["step"] for row in records.rows)
    return markdown(
        ("step", "PSNR dB; by set"), [(_step(step), _by_set(list(records.all(step=step)))) for step in steps]
    )


def moment_steps(records: Records, scheme: str) -> str:
    """Of one scheme: each choice of steps, and what it gains over the first on the same pictures."""
    steps = list({str(row["step"]): row["step"] for row in records.all(scheme=scheme)}.values())
    base = list(records.all(scheme=scheme, step=steps[0]))
    lines = []
    for step in steps:
        rows = list(records.all(scheme=scheme, step=step))
        named = ", ".join(map(_step, step)) if isinstance(step, list) else _step(step)
        lines.append((named, _by_set(rows), "-" if step == steps[0] else gain(rows, base)))
    return markdown(("steps", "PSNR dB; by set", f"gain over {_step(steps[0])}, dB"), lines)


def combinations(records: Records) -> str:
    steps = list(dict.fromkeys(row["steps"] for row in records.rows))
    lines = []
    for name in dict.fromkeys(row["variant"] for row in records.rows):
        rows = [records.find(variant=name, steps=count) for count in steps]
        bits = rows[0].get("bits_per_weight")
        change = gain(rows[-1:], rows[:1])
        lines.append((name, f"{bits:.2f}" if bits else "-", *(shown(over_sets([row])) for row in rows), change))
    header = ("", "bits per weight", *(f"{count} steps, dB" for count in steps), f"{steps[-1]} against {steps[0]}")
    return markdown(header, lines)


def layers(records: Records) -> str:
    lines = []
    for row in records.rows:
        asked = dict(scheme=row["scheme"], rounding=row["rounding"])
        base = records.find(**asked, change="the recipe's plan")
        name = f"{row['scheme']}, {row['rounding']}"
        change = gain([row], [base]) if row is not base else f"**{shown(over_sets([row]))}**"
        lines.append((name, row["change"], f"{row['bits_of_all_layers']:.2f}", change))
    return markdown(("scheme", "change", "bits per weight, all layers", "PSNR or its change, dB"), lines)


def semistatic(records: Records) -> str:
    """Each scheme and strength, and what it gains over the first on the same pictures."""
    base = list(records.all(scheme="w8a8_static", strength=None))
    lines = []
    for scheme, strength in dict.fromkeys((row["scheme"], row["strength"]) for row in records.rows):
        rows = list(records.all(scheme=scheme, strength=strength))
        how = scheme if strength is None else f"{scheme}, smoothed by {strength}"
        change = "-" if (scheme, strength) == ("w8a8_static", None) else gain(rows, base)
        lines.append((how, _by_set(rows), change))
    return markdown(("", "PSNR dB; by set", "gain, dB"), lines)


def smoothing(records: Records) -> str:
    lines = []
    strengths = (0.25, 0.5, 0.75, 1.0)
    for base in records.all(remedy="smoothing", strength=None):
        asked = dict(remedy="smoothing", scheme=base["scheme"], rounding=base["rounding"])
        changes = [gain([records.find(**asked, strength=strength)], [base]) for strength in strengths]
        lines.append((f"{base['scheme']}, {base['rounding']}", shown(over_sets([base])), *changes))
    return markdown(("", "as it is, dB", *(f"strength {strength}" for strength in strengths)), lines)


def budgets(records: Records) -> str:
    """Plans, and what each gains over the largest uniform format that is no larger."""
    lines = []
    for row in records.all(remedy="budget"):
        alike = dict(remedy="budget", rounding=row["rounding"])
        how, change = row.get("uniform"), "-"
        if how is None:
            how = f"{row['budget']} bits by the noise of {row['errors']}"
            uniform = [other for other in records.all(**alike) if other.get("uniform")]
            smaller = [other for other in uniform if other["bits_per_weight"] <= row["bits_per_weight"]]
            base = max(smaller, key=lambda other: other["bits_per_weight"])
            change = f"{gain([row], [base])} over {base['uniform']}"
        lines.append((how, f"{row['bits_per_weight']:.2f}", row["rounding"], shown(over_sets([row])), change))
    return markdown(("plan", "bits per weight", "rounding", "PSNR dB", "gain over a uniform format"), lines)


def peers(records: Records) -> str:
    """All of them, by bits, and how far ours of 4.17 bits is ahead."""
    weights = records.about["quantized_weights"]
    ours = records.find(package="ditq_kernels", method=OURS)
    lines = []
    for row in sorted(records.rows, key=lambda row: row["bits_per_weight"]):
        name = f"{row['package']} {row.get('version') or ''}".strip()
        ahead = "-" if row is ours else gain([ours], [row])
        numbers = f"{row['bits_per_weight']:.2f}", f"{row['bits_per_weight'] * weights / 8e6:.2f}"
        lines.append((name, row["method"], *numbers, shown(over_sets([row])), ahead))
    return markdown(
        ("library", "method", "bits per weight", "MB", "PSNR dB", "ours (4.17 bits, compensated) ahead by"), lines
    )


def lead(records: Records, up_to: float = 4.5) -> float:
    """By how much ours of 4.17 bits, compensated, is ahead of the best of the others of ``up_to`` bits, dB."""
    others = [row for row in records.rows if row["package"] != "ditq_kernels" and row["bits_per_weight"] <= up_to]
    ours = over_sets(records.all(package="ditq_kernels", method=OURS))
    return min(float((ours - over_sets([row])).mean()) for row in others)


def distribution(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        excess = "-"
        if row["frechet_excess"] is not None:
            low, high = row["frechet_excess_interval"]
            excess = f"{row['frechet_excess']:+.4f} ({low:+.4f} to {high:+.4f})"
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        distance = f"{row['frechet']:.4f} ({row['frechet_of_means']:.4f})"
        variation = "-" if row["variation"] is None else f"{row['variation']:.3f}"
        judged = f"{row['score']:.3f}", f"{row['accuracy']:.1%}"
        lines.append((row["name"], distance, excess, variation, psnr, *judged))
    header = (
        "",
        "Fréchet distance (of means)",
        "more than the original's",
        "variation",
        "PSNR dB",
        "score",
        "accuracy",
    )
    return markdown(header, lines)
