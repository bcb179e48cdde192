"""What takes turns is measured side by side: whatever else the machine does meets all alike."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .. import __version__


@dataclass(frozen=True)
class Quartiles:
    """Of what was measured, round by round."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def version_of(package: str | None) -> str | None:
    """Installed version; None where it is missing. None is this package, which also runs from its sources."""
    if package is None:
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said_by(error: Exception) -> str:
    """What another library's error says, in a table's cell."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def no_matter() -> None:
    """In the place of what is told that something has got on."""


def take_turns(
    measured: Mapping[str, Callable[[], float]], rounds: int, advance: Callable[[], object] = no_matter
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """By name, what each call said in each of ``rounds``, of at least two, after one round that warms up; and what the
    calls said that failed, which end their turns. Each round another begins. ``advance`` is called before each turn.
    """
    found: dict[str, list[float]] = {name: [] for name in measured}
    failed: dict[str, str] = {}
    names = list(measured)
    for turn in range(rounds + 1):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            advance()
            if name in failed:
                continue
            try:
                value = measured[name]()
            except Exception as error:
                failed[name] = said_by(error)
                continue
            if turn:
                found[name].append(value)
    return {name: values for name, values in found.items() if name not in failed}, failed
