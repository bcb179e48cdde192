"""What is evaluated: the original, its noise floor, schemes, and models of other directories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..layer.formats import Scheme
from ..model.conversion import ROUNDINGS


@dataclass(frozen=True)
class Variant:
    """One model to evaluate: the original, in its own dtype (None) or another, a scheme with a way to round, or a model
    of its own directory.
    """

    name: str
    scheme: str | None = None
    rounding: str = "nearest"
    dtype: torch.dtype | None = None
    other_seeds: bool = False
    directory: Path | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration: static activations and compensated rounding do."""
        return self.scheme is not None and (self.rounding == "compensated" or Scheme.parse(self.scheme).static)


ORIGINAL = Variant("original")
BF16 = Variant("original, bf16", dtype=torch.bfloat16)
NOISE_FLOOR = (Variant("original, other seeds", other_seeds=True), BF16)


def variants(
    schemes: Sequence[str], directories: Sequence[Path] = (), roundings: Sequence[str] = ROUNDINGS
) -> Iterator[Variant]:
    """The original, its noise floor, other models in ``directories``, and each scheme: 4-bit ones with each of
    ``roundings``, the others to nearest.
    """
    yield ORIGINAL
    yield from NOISE_FLOOR
    for directory in directories:
        yield Variant(str(directory), directory=directory)
    for name in schemes:
        scheme = Scheme.parse(name)
        for rounding in roundings if scheme.weight.bits == 4 else ROUNDINGS[:1]:
            shown = scheme.name if rounding == "nearest" else f"{scheme.name} {rounding}"
            yield Variant(shown, scheme.name, rounding)
