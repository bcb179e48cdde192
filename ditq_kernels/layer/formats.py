"""What a number format is: frozen values in literal tables, and nothing that computes on tensors.

A 4-bit grouped weight is a compressed int8 weight. Per output channel there is one fp32 scale; per group of inputs one
byte that holds a multiplier
``m`` in 1..16 and a zero point ``z`` in 0..15; per weight a code ``u`` in 0..15:

    w[n, k] = scale[n] * m[k // G, n] * (u[n, k] - z[k // G, n])

The integer ``m * (u - z)`` always fits int8, because every format keeps ``(15 - z) * m <= 127`` and ``z * m <= 128``
(:func:`largest_multiplier`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

GROUP_SIZES = (128, 64, 32)
INT8_MAX = 127  # symmetric codes: -128 is never produced
CODE4_MAX = 15
MOST_INT8_INPUTS = (2**31 - 1) // (127 * 128)  # whose products, of codes to 127 and weights to -128, int32 sums
MULTIPLIER_MAX = 16


def largest_multiplier(zero_point: int) -> int:
    """The largest ``m`` for which every ``m * (u - zero_point)``, ``u`` in 0..15, lies in -128..127 and ``m`` fits its
    nibble.
    """
    above = INT8_MAX // (CODE4_MAX - zero_point) if zero_point < CODE4_MAX else MULTIPLIER_MAX
    below = (INT8_MAX + 1) // zero_point if zero_point > 0 else MULTIPLIER_MAX
    return min(MULTIPLIER_MAX, above, below)


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one layer are stored.

    Attributes:
        bits: bits of a code, 8 or 4.
        group: inputs that share one group parameter, or None for one group per output channel.
        scaling: "float": fp32 scales, one per group; "two_level": one fp32 scale per channel and one byte (multiplier,
            zero point) per group.
        layout: the name of the codes' layout in :data:`ditq_kernels.layer.packing.LAYOUTS`.
    """

    bits: int
    group: int | None
    scaling: Literal["float", "two_level"]
    layout: str

    @functools.cached_property
    def name(self) -> str:
        """The part of a scheme's name that speaks of weights, such as ``w4_g128``."""
        return f"w{self.bits}" + (f"_g{self.group}" if self.group else "")

    @property
    def promoted(self) -> bool:
        """Whether partial sums are scaled group by group in fp32, so that one integer accumulator cannot span all of
        K.
        """
        return self.scaling == "float" and self.group is not None

    @property
    def two_level(self) -> bool:
        return self.scaling == "two_level"

    def group_count(self, in_features: int) -> int:
        """Groups along K; the last one may be shorter."""
        return -(-in_features // self.group) if self.group else 1

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the fp32 scales: [groups, N] where groups have float scales, else [N]."""
        return (self.group_count(in_features), out_features) if self.promoted else (out_features,)


@dataclass(frozen=True)
class ActivationFormat:
    """How a layer's input enters the matrix product.

    Attributes:
        bits: 16 (the input's own dtype, unchanged) or 8.
        scaling: "none"; "token": one scale per row, found at run time; "tensor": one calibrated scale for the layer;
            "mixed": of models, never of one layer: "token" behind activation functions, "tensor" elsewhere.
    """

    bits: int
    scaling: Literal["none", "token", "tensor", "mixed"]


def check_int8_inputs(in_features: int, fmt: WeightFormat) -> None:
    """ValueError if a sum of so many products of int8 may overflow int32, as formats without scaled groups sum."""
    if in_features > MOST_INT8_INPUTS and not fmt.promoted:
        raise ValueError(
            f"K = {in_features} has more products of int8 than int32 holds the sum of ({MOST_INT8_INPUTS}): use 16-bit "
            "activations, or w8a8_g128, which sums groups"
        )


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format; parse one from its name with :meth:`parse`."""

    name: str
    weight: WeightFormat
    activation: ActivationFormat

    def __str__(self) -> str:
        return self.name

    @property
    def static(self) -> bool:
        """Whether activation scales are calibrated and not found at run time, those of a mixed one in part."""
        return self.activation.scaling in ("tensor", "mixed")

    @property
    def mixed(self) -> bool:
        """Whether it is a model's, and layers take one of two schemes: :meth:`of_layer`."""
        return self.activation.scaling == "mixed"

    def of_layer(self, behind_activation: bool) -> Scheme:
        """The scheme of a layer in a model that is to be quantized to this one.

        Args:
            behind_activation: whether the layer is fed by an activation function, whose range a calibration knows
                worst, and behind which quantization is fused at run time.
        """
        if not self.mixed:
            return self
        return SCHEMES[self.name.removesuffix(SEMISTATIC) + ("" if behind_activation else "_static")]

    @property
    def weight_only(self) -> Scheme:
        """The scheme with the same weights and 16-bit activations."""
        return SCHEMES[re.sub("a8", "a16", self.name).removesuffix(SEMISTATIC).removesuffix("_static")]

    @classmethod
    def parse(cls, name: str | Scheme) -> Scheme:
        """The scheme called ``name``; a :class:`Scheme` is returned as it is.

        The grammar is ``w<bits>a<bits>[_g<G>][_static | _semistatic]``.

        Raises:
            ValueError: naming what is allowed.
        """
        if isinstance(name, Scheme):
            return name
        known = SCHEMES.get(name) or MIXED_SCHEMES.get(name)
        if known is not None:
            return known
        groups = ", ".join(str(group) for group in sorted(GROUP_SIZES))
        raise ValueError(
            f"unknown scheme {name!r}: a scheme reads w<bits>a<bits>[_g<group>][_static] with weight bits 8 or 4, "
            f"activation bits 8 or 16, groups of {groups} (none: one scale per output channel), and _static, or for a "
            f"whole model _semistatic, only with 8-bit activations; for example {', '.join(RECOMMENDED)}"
        )

    @classmethod
    def parse_for_layer(cls, name: str | Scheme) -> Scheme:
        """:meth:`parse` of what one layer is to have.

        Raises:
            ValueError: for a mixed scheme, too.
        """
        scheme = cls.parse(name)
        if scheme.mixed:
            choices = " or ".join(scheme.of_layer(behind).name for behind in (False, True))
            raise ValueError(f"{scheme} is a whole model's: give a layer {choices}")
        return scheme


# One line a format; the order is the one in which tables and messages list them.
WEIGHT_FORMATS = {
    fmt.name: fmt
    for fmt in (
        WeightFormat(8, None, "float", "int8"),
        WeightFormat(8, 128, "float", "int8"),
        WeightFormat(8, 64, "float", "int8"),
        WeightFormat(8, 32, "float", "int8"),
        WeightFormat(4, None, "two_level", "int4_planar128"),
        WeightFormat(4, 128, "two_level", "int4_planar128"),
        WeightFormat(4, 64, "two_level", "int4_planar128"),
        WeightFormat(4, 32, "two_level", "int4_planar128"),
    )
}

ACTIVATION_FORMATS = {
    "a8": ActivationFormat(8, "token"),
    "a8_static": ActivationFormat(8, "tensor"),
    "a16": ActivationFormat(16, "none"),
}

# The schemes to consider first, in that order: the rows of reports and of the README's table.
RECOMMENDED = (
    "w8a8",
    "w8a8_static",
    "w8a8_g128",
    "w4a8_g128",
    "w4a8_g128_static",
    "w8a16_g128",
    "w4a16_g128",
)


def _every_scheme() -> dict[str, Scheme]:
    schemes = {}
    for weight in WEIGHT_FORMATS.values():
        bits, _, group = weight.name.partition("_")
        for label, activation in ACTIVATION_FORMATS.items():
            precision, _, static = label.partition("_")
            name = "_".join(part for part in (bits + precision, group, static) if part)
            schemes[name] = Scheme(name, weight, activation)
    return {name: schemes[name] for name in (*RECOMMENDED, *schemes)}


SCHEMES: dict[str, Scheme] = _every_scheme()

SEMISTATIC = "_semistatic"
MIXED_SCHEMES: dict[str, Scheme] = {
    scheme.name.removesuffix("_static") + SEMISTATIC: Scheme(
        scheme.name.removesuffix("_static") + SEMISTATIC, scheme.weight, ActivationFormat(8, "mixed")
    )
    for scheme in SCHEMES.values()
    if scheme.static
}
