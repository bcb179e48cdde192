"""What the arguments of ``ditq``'s commands may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from .model.chosen_steps import ALL_STEPS

ARCHITECTURES = ("80", "86", "89", "90", "100", "103", "120", "121")
# How each command adds itself: (name, run, help, examples, device=True); ``run`` takes the arguments and returns the
# exit code, and ``device`` is whether there is ``--device``.
AddCommand = Callable[..., argparse.ArgumentParser]


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A whole number that generators of random numbers take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def step(text: str) -> int | float | str | tuple[int | float, ...]:
    """A step of a run: an index or a fraction; several with commas between; or all of them."""
    if text == ALL_STEPS:
        return text
    try:
        found = tuple(int(part) if part.removeprefix("-").isdecimal() else float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no step: an index (negative from the end), a fraction of the run, several with commas, or "
            f"{ALL_STEPS!r}"
        ) from None
    return found if len(found) > 1 else found[0]


def fraction(text: str) -> float:
    """A position in a run, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a position in the run, from 0 to 1")
    return value


def clip(text: str) -> str | float:
    """How far ranges of groups are shrunk: a ratio, or "search"."""
    try:
        return text if text == "search" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a ratio in (0, 1] nor "search"') from None


def number(text: str) -> float:
    """Any finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def seconds(text: str) -> float:
    """A positive time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def architecture(text: str) -> int:
    """10 * major + minor of a GPU architecture, written ``sm_90`` or ``90``."""
    if text.removeprefix("sm_") not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}")
    return int(text.removeprefix("sm_"))


def device(name: str | None) -> str:
    """The device that ``--device`` means; without it a GPU if there is one. Asked when a command runs, so that what is
    wrong is said as its other errors are.

    Raises:
        ValueError: for a name that is none, or a GPU that is not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; --device takes cpu, cuda, cuda:1 ...")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA GPU; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA GPU(s)")
    return name
