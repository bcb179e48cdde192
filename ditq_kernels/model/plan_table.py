"""A plan as an aligned table, layers that are treated alike drawn together."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

from .plan_entry import PlanEntry


def plan_table(entries: list[PlanEntry], every_layer: bool) -> list[str]:
    """Lines of ``entries``: name, K -> N, scheme, reason. Names that differ in numbers only are drawn together."""
    rows = [("layer", "K -> N", "scheme", "reason")]
    for name, entry in [(e.name, e) for e in entries] if every_layer else _merged(entries):
        rows.append((name, f"{entry.in_features} -> {entry.out_features}", entry.scheme or "16 bits", entry.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def _merged(entries: list[PlanEntry]) -> list[tuple[str, PlanEntry]]:
    groups: dict[tuple, list[tuple[tuple[int, ...], PlanEntry]]] = defaultdict(list)
    for entry in entries:
        parts = entry.name.split(".")
        template = tuple(None if part.isdecimal() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        alike = (template, entry.in_features, entry.out_features, entry.scheme, entry.reason)
        groups[alike].append((numbers, entry))
    lines = []
    for (template, *_), members in groups.items():
        axes = [sorted(set(axis)) for axis in zip(*(numbers for numbers, _ in members), strict=True)]
        # Only a full grid of numbers can be written as one name that stands for exactly these layers.
        if set(product(*axes)) == {numbers for numbers, _ in members}:
            spans = iter([_span(axis) for axis in axes])
            name = ".".join(next(spans) if part is None else part for part in template)
            lines.append((name, members[0][1]))
        else:
            lines += [(entry.name, entry) for _, entry in members]
    return lines


def _span(numbers: list[int]) -> str:
    """Sorted ``numbers`` as ``4`` or ``{0-3,5}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
