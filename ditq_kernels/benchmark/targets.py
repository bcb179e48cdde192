"""What the project set out to reach, as data, and whether a run's results reach it.

Every target is a ratio of two durations of the same run on the same shape, or a share of a bandwidth measured in that
run. It is judged by the worst of its shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..shapes import LAYERS
from .contenders import BASELINE
from .elementwise import PLAIN

Shape = tuple[int, int, int]
# By name of the contender, then shape (M, N, K); of passes over activations N is 0.
Durations = Mapping[str, Mapping[Shape, float]]


@dataclass(frozen=True)
class Shapes:
    """Which shapes a target speaks of.

    Attributes:
        rows: smallest and largest M.
        sides: the pairs (N, K); empty for all.
        least_columns: of passes over activations, the smallest K.
    """

    rows: tuple[int, int]
    sides: frozenset[tuple[int, int]] = frozenset()
    least_columns: int = 0

    def __contains__(self, shape: Shape) -> bool:
        rows, out_features, in_features = shape
        return (
            self.rows[0] <= rows <= self.rows[1]
            and (not self.sides or (out_features, in_features) in self.sides)
            and in_features >= self.least_columns
        )


@dataclass(frozen=True)
class Target:
    """Attributes:
    text: for people.
    contender: whose speed it is about.
    against: contenders that it is compared with, the fastest that was measured on the shape; empty for the copy
        bandwidth.
    least: the ratio to reach.
    shapes: where.
    """

    text: str
    contender: str
    against: tuple[str, ...]
    least: float
    shapes: Shapes


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    state: "met", "missed" or "not measured".
    ratio, shape: the worst one measured.
    """

    target: Target
    state: str
    ratio: float | None = None
    shape: Shape | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return f"not measured (target {self.target.least:.2f}x): {self.target.text}"
        sign = "≥" if self.state == "met" else "<"
        rows, out_features, in_features = self.shape
        at = f"M={rows}" + (f" N={out_features}" if out_features else "") + f" K={in_features}"
        return f"{self.state} {self.ratio:.2f}x {sign} {self.target.least:.2f}x: {self.target.text} [{at}]"


def _sides(model: str) -> frozenset[tuple[int, int]]:
    return frozenset(
        (layer.out_features, layer.in_features)
        for layer in LAYERS
        if layer.model.startswith(model) and not layer.modulation
    )


ANY = 1 << 30
_FLUX_ATTENTION = Shapes((4096, 4096), frozenset({(3072, 3072)}))
_DIT_XL = _sides("DiT-XL/2")
_MODULATION = Shapes((1, 16), frozenset({(18432, 3072), (6912, 1152)}))
_EVERY_INT_MM = ("int_mm+scaling compiled", "int_mm+scaling eager")
W8A8 = "w8a8 product"

TARGETS = (
    Target("W8A8 product, 4096 x 3072 x 3072, to cuBLAS bf16", W8A8, (BASELINE,), 1.9, _FLUX_ATTENTION),
    Target("W8A8 with quantization, 4096 x 3072 x 3072, to cuBLAS bf16", "w8a8", (BASELINE,), 1.7, _FLUX_ATTENTION),
    Target("W8A8 product, DiT-XL/2 at M=2048, to cuBLAS bf16", W8A8, (BASELINE,), 1.6, Shapes((2048, 2048), _DIT_XL)),
    Target("W8A8 product, DiT-XL/2 at M=512, to cuBLAS bf16", W8A8, (BASELINE,), 1.3, Shapes((512, 512), _DIT_XL)),
    Target("W8A8 product to _int_mm and separate scaling", W8A8, _EVERY_INT_MM, 1.3, Shapes((17, ANY))),
    Target("W8A8 product to _scaled_mm fp8", W8A8, ("scaled_mm fp8 rowwise",), 0.97, Shapes((17, ANY))),
    Target("W4A8_g128 product at M >= 2048 to our W8A8", "w4a8_g128 product", (W8A8,), 0.95, Shapes((2048, ANY))),
    Target("W4A8_g128 product at M <= 256 to our W8A8", "w4a8_g128 product", (W8A8,), 1.1, Shapes((1, 256))),
    Target("W4A16_g128 at M >= 1024 to cuBLAS bf16", "w4a16_g128", (BASELINE,), 0.97, Shapes((1024, ANY))),
    Target("W8A16_g128 at M >= 1024 to cuBLAS bf16", "w8a16_g128", (BASELINE,), 0.97, Shapes((1024, ANY))),
    Target("W4A16_g128, modulation at M <= 16, to cuBLAS bf16", "w4a16_g128", (BASELINE,), 3.3, _MODULATION),
    Target("W8A16, modulation at M <= 16, to cuBLAS bf16", "w8a16", (BASELINE,), 1.8, _MODULATION),
    Target("quantization, share of the copy bandwidth", "quantize", (), 0.85, Shapes((4096, ANY), least_columns=3072)),
    Target(
        "LayerNorm + modulate + quantize to LayerNorm + modulate",
        "layernorm+modulate+quantize",
        (PLAIN,),
        1.0,
        Shapes((512, ANY)),
    ),
)


def judge(target: Target, durations: Durations, copy_share: Mapping[str, Mapping[Shape, float]]) -> Verdict:
    """The verdict on one target.

    Args:
        durations: microseconds, of checked results only.
        copy_share: of passes over activations, their bandwidth as a share of a copy's.
    """
    if target.against:
        ratios = {}
        for shape, microseconds in durations.get(target.contender, {}).items():
            others = [durations[name][shape] for name in target.against if shape in durations.get(name, {})]
            if shape in target.shapes and others:
                ratios[shape] = min(others) / microseconds
    else:
        ratios = {
            shape: share for shape, share in copy_share.get(target.contender, {}).items() if shape in target.shapes
        }
    if not ratios:
        return Verdict(target, "not measured")
    worst = min(ratios, key=ratios.get)
    return Verdict(target, "met" if ratios[worst] >= target.least else "missed", ratios[worst], worst)
