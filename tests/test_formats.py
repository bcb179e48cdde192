import dataclasses
import re

import pytest

from ditq_kernels import SCHEMES, Scheme
from ditq_kernels.layer.formats import (
    CODE4_MAX,
    MIXED_SCHEMES,
    MULTIPLIER_MAX,
    RECOMMENDED,
    WEIGHT_FORMATS,
    largest_multiplier,
)
from ditq_kernels.layer.packing import LAYOUTS


def test_every_scheme_parses_to_itself():
    for name, scheme in SCHEMES.items():
        assert Scheme.parse(name) is scheme and Scheme.parse(scheme) is scheme and str(scheme) == name
        assert scheme.weight.layout in LAYOUTS


def test_a_name_says_what_a_scheme_is():
    for name, scheme in (SCHEMES | MIXED_SCHEMES).items():
        weights, activations, group, kind = re.fullmatch(r"w(\d+)a(\d+)(?:_g(\d+))?(?:_(\w+))?", name).groups()
        assert (scheme.weight.bits, scheme.activation.bits) == (int(weights), int(activations))
        assert scheme.weight.group == (int(group) if group else None)
        plain = {"16": "none", "8": "token"}[activations]
        assert scheme.activation.scaling == {None: plain, "static": "tensor", "semistatic": "mixed"}[kind]


def test_the_recommended_schemes_come_first():
    assert tuple(SCHEMES)[: len(RECOMMENDED)] == RECOMMENDED
    assert len(SCHEMES) == len(WEIGHT_FORMATS) * 3


@pytest.mark.parametrize("name", ["w3a8", "w8a8_g48", "w8a16_static", "w4a16_g128_static", "W8A8", "", "w8a8_g128_g64"])
def test_unknown_schemes_are_refused_with_what_is_allowed(name):
    with pytest.raises(
        ValueError, match=r"unknown scheme .*w<bits>a<bits>\[_g<group>\]\[_static\].*groups of 32, 64, 128 "
    ):
        Scheme.parse(name)


def test_mixed_schemes_are_of_models():
    assert set(MIXED_SCHEMES) == {
        name.replace("_static", "_semistatic") for name in SCHEMES if name.endswith("_static")
    }
    for name, scheme in MIXED_SCHEMES.items():
        assert Scheme.parse(name) is scheme and scheme.static and scheme.mixed and name not in SCHEMES
        assert scheme.of_layer(False) is SCHEMES[name.replace("_semistatic", "_static")]
        assert scheme.of_layer(True) is SCHEMES[name.removesuffix("_semistatic")]
        assert scheme.weight_only is scheme.of_layer(True).weight_only
    with pytest.raises(ValueError, match=r"w4a8_semistatic is a whole model's: give a layer w4a8_static or w4a8$"):
        Scheme.parse_for_layer("w4a8_semistatic")
    for scheme in SCHEMES.values():
        assert scheme.of_layer(True) is scheme.of_layer(False) is Scheme.parse_for_layer(scheme) and not scheme.mixed


def test_weight_only_keeps_the_weights():
    for scheme in SCHEMES.values():
        assert scheme.weight_only.weight is scheme.weight
        assert scheme.weight_only.activation.bits == 16


def test_formats_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["w8a8"].weight.bits = 4


def test_multipliers_reach_exactly_as_far_as_int8_allows():
    for zero_point in range(CODE4_MAX + 1):

        def fits(multiplier, zero_point=zero_point):
            products = [multiplier * (code - zero_point) for code in range(CODE4_MAX + 1)]
            return multiplier <= MULTIPLIER_MAX and min(products) >= -128 and max(products) <= 127

        limit = largest_multiplier(zero_point)
        assert fits(limit) and not fits(limit + 1)
