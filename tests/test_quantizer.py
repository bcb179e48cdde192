import pytest
import torch
from oracle import linear

from ditq_kernels.layer import cpu_extension, quantizer
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.grid import CLIP_RATIOS, ZERO_POINT_RULES, fit_grid
from ditq_kernels.layer.packed_weight import PackedWeight
from ditq_kernels.layer.packing import LAYOUTS, pack_groups
from ditq_kernels.layer.quantizer import quantize_weight
from ditq_kernels.layer.reference import dequantize

FORMATS = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
TWO_LEVEL = [fmt for fmt in WEIGHT_FORMATS.values() if fmt.two_level]
CPU = torch.device("cpu")


def dequantized(quantized, fmt, in_features):
    stored = LAYOUTS[fmt.layout].pack(quantized.codes)
    group_code = pack_groups(quantized.multiplier, quantized.zero_point) if fmt.two_level else None
    return dequantize(PackedWeight(stored, quantized.scale, group_code, fmt, in_features))


def moment(in_features, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(tokens, in_features, generator=generator) @ mixing
    return x.T @ x


def output_error(weight, approximation, input_moment):
    difference = (approximation - weight).double()
    return ((difference @ input_moment.double()) * difference).sum()


def in_python(monkeypatch):
    monkeypatch.setattr(cpu_extension, "rounds", lambda weight: False)


@FORMATS
@pytest.mark.parametrize("in_features", [128, 150, 384])
def test_codes_stay_in_range_and_products_in_int8(fmt, in_features):
    quantized = quantize_weight(linear(24, in_features, CPU).weight, fmt)
    if fmt.two_level:
        m, z = quantized.multiplier.int(), quantized.zero_point.int()
        assert quantized.codes.max() <= 15 and m.min() >= 1 and m.max() <= 16 and z.max() <= 15
        assert ((15 - z) * m).max() <= 127 and (z * m).max() <= 128
    else:
        assert quantized.codes.abs().max() == 127


@FORMATS
def test_rounding_is_to_the_nearest_stored_value(fmt):
    """No weight is further from its stored value than the nearest of all values that its group can store."""
    weight = linear(16, 150, CPU).weight.detach()
    quantized = quantize_weight(weight, fmt)
    actual = dequantized(quantized, fmt, 150)
    group = fmt.group or 150
    for index in range(fmt.group_count(150)):
        columns = slice(index * group, (index + 1) * group)
        if fmt.two_level:
            levels = (torch.arange(16) - quantized.zero_point[index].int().unsqueeze(1)) * quantized.multiplier[
                index
            ].int().unsqueeze(1)
            levels = levels * quantized.scale.unsqueeze(1)
        else:
            scale = quantized.scale[index] if fmt.promoted else quantized.scale
            levels = torch.arange(-127, 128) * scale.unsqueeze(1)
        w = weight[:, columns]
        best = (w.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
        # Codes at the middle between two values may fall to either; beyond that only fp32 rounding of the quotient is
        # allowed.
        slack = torch.finfo(torch.float32).eps * levels.abs().amax()
        assert ((w - actual[:, columns]).abs() <= best + slack).all()


@FORMATS
def test_stored_values_quantize_to_themselves(fmt):
    weight = dequantized(quantize_weight(linear(16, 256, CPU).weight, fmt), fmt, 256)
    again = dequantized(quantize_weight(weight, fmt), fmt, 256)
    if fmt.two_level:
        # The scale may be chosen anew (a coarser group cannot become finer), so only the error is bounded: by half a
        # step.
        step = weight.abs().amax(1, keepdim=True) / 7
        assert ((again - weight).abs() <= step / 2).all()
    else:
        assert torch.allclose(again, weight, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@FORMATS
def test_zero_weights_stay_zero(fmt):
    quantized = quantize_weight(torch.zeros(8, 256), fmt)
    assert torch.equal(dequantized(quantized, fmt, 256), torch.zeros(8, 256))


@pytest.mark.parametrize("fmt", TWO_LEVEL, ids=lambda fmt: fmt.name)
def test_finer_zero_points_lower_the_error(fmt):
    weight = linear(32, 384, CPU).weight.detach()  # its groups lean to one side
    errors = {
        rule: (dequantized(quantize_weight(weight, fmt, zero_point=rule), fmt, 384) - weight).square().sum()
        for rule in ZERO_POINT_RULES
    }
    assert errors["best"] < errors["eighth_level"] < errors["symmetric"]


@FORMATS
def test_clip_search_reduces_the_weights_error(fmt):
    weight = linear(32, 384, CPU).weight.detach()
    plain, searched = (dequantized(quantize_weight(weight, fmt, clip=clip), fmt, 384) for clip in (None, "search"))
    better, before = (searched - weight).square().sum(), (plain - weight).square().sum()
    # The smallest step down of the range clips the largest weight by three of 127 levels, which nothing makes up for.
    assert better < before if fmt.bits == 4 else better == before
    clipped = dequantized(quantize_weight(weight, fmt, clip=0.5), fmt, 384)
    assert clipped.abs().max() < plain.abs().max()


@FORMATS
def test_compensation_lowers_the_output_error(fmt):
    weight = linear(48, 256, CPU).weight.detach()
    seen = moment(256, 512)
    nearest, compensated = (dequantized(quantize_weight(weight, fmt, input_moment=m), fmt, 256) for m in (None, seen))
    assert output_error(weight, compensated, seen) < 0.7 * output_error(weight, nearest, seen)


@FORMATS
@pytest.mark.parametrize("in_features", [256, 150])
def test_compensation_of_uncorrelated_inputs_is_rounding_to_nearest(fmt, in_features):
    weight = linear(24, in_features, CPU).weight
    plain = quantize_weight(weight, fmt)
    compensated = quantize_weight(weight, fmt, input_moment=3 * torch.eye(in_features))
    assert torch.equal(plain.codes, compensated.codes)


@FORMATS
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_singular_moment_is_damped(fmt, tokens):
    """Fewer tokens than inputs, one token, none at all, and inputs that never fire."""
    weight = linear(24, 256, CPU).weight.detach()
    singular = moment(256, tokens)
    singular[:, :9] = 0
    singular[:9] = 0
    compensated = dequantized(quantize_weight(weight, fmt, input_moment=singular), fmt, 256)
    nearest = dequantized(quantize_weight(weight, fmt), fmt, 256)
    assert torch.isfinite(compensated).all()
    assert output_error(weight, compensated, singular) <= output_error(weight, nearest, singular)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=torch.full((4, 128), float("nan"))), "NaN or infinite"),
        (dict(weight=torch.ones(4, 100)), r"groups of 128 are larger than K = 100"),
        (dict(weight=torch.ones(128)), r"\[N, K\]"),
        (dict(weight=torch.ones(4, 128, dtype=torch.int8)), "floating-point"),
        (dict(clip=1.5), r"clip must be .*got 1.5"),
        (dict(clip="best"), "clip must be"),
        (dict(zero_point="middle"), "unknown zero_point 'middle'; allowed: symmetric"),
        (dict(input_moment=torch.eye(64)), r"\[128, 128\], got \[64, 64\]"),
        (dict(input_moment=torch.full((128, 128), float("inf"))), "input_moment holds NaN"),
    ],
)
def test_bad_input_is_named(arguments, message):
    arguments = dict(weight=torch.ones(4, 128)) | arguments
    with pytest.raises(ValueError, match=message):
        quantize_weight(arguments.pop("weight"), WEIGHT_FORMATS["w4_g128"], **arguments)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("clip", [None, 0.9, "search"])
def test_rows_in_chunks_are_quantized_as_all_at_once(name, clip, monkeypatch):
    """In Python; the extension takes no memory for rows."""
    in_python(monkeypatch)
    w = torch.randn(70, 200, generator=torch.Generator().manual_seed(1)) * torch.arange(70).view(70, 1)
    whole = quantize_weight(w, WEIGHT_FORMATS[name], clip=clip)
    rows, quantize_rows = [], quantizer._quantize_rows
    monkeypatch.setattr(quantizer, "_quantize_rows", lambda w, *how: rows.append(len(w)) or quantize_rows(w, *how))
    monkeypatch.setattr(quantizer, "CHUNK", {False: 200 * 16, True: 200 * 16})
    chunked = quantize_weight(w, WEIGHT_FORMATS[name], clip=clip)
    assert rows == [16, 16, 16, 16, 6]
    for part in ("codes", "scale", "multiplier", "zero_point"):
        one, other = getattr(whole, part), getattr(chunked, part)
        assert (one is other is None) or (torch.equal(one, other) and one.shape == other.shape), part
    w[69, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(w, WEIGHT_FORMATS[name], clip=clip)


by_either = pytest.mark.parametrize("prepare", [lambda monkeypatch: None, in_python], ids=["as it is", "in Python"])


@by_either
def test_multipliers_of_known_groups(prepare, monkeypatch):
    """Channels whose groups of 32 reach 7 times 16, 5 and 1 of the same unit are stored as they are; a reach of 7 * 5.5
    becomes 5 or 6 units, whichever suits the group's other weights.
    """
    prepare(monkeypatch)
    fmt, unit = WEIGHT_FORMATS["w4_g32"], 2.0**-6
    widest = torch.arange(32) % 15 - 7
    exact = torch.cat([16 * widest, 5 * widest, widest]).float() * unit
    of_five, of_six = (torch.tensor([7 * 5.5, *[step * (i % 6 - 3) for i in range(31)]]) for step in (5.0, 6.0))
    mixed = torch.cat([16.0 * widest, of_five, of_six]) * unit
    quantized = quantize_weight(torch.stack([exact, mixed, 8 * exact]), fmt, zero_point="symmetric")
    assert quantized.scale.tolist() == [unit, unit, 8 * unit]
    assert quantized.multiplier.T.tolist() == [[16, 5, 1], [16, 5, 6], [16, 5, 1]]
    assert (quantized.zero_point == 8).all()
    assert torch.equal(dequantized(quantized, fmt, 96)[::2], torch.stack([exact, 8 * exact]))


def test_a_clip_search_finds_the_best_of_all_ratios():
    """Of each group by itself, whose error no single ratio betters, and which one ratio for all does not reach."""
    weight = linear(16, 384, CPU).weight.detach()

    def errors(clip):
        grid = fit_grid(weight, 32, ZERO_POINT_RULES["symmetric"], clip, 0, 15)
        of_each = (grid.values(grid.round(weight)) - weight).double().square()
        return of_each.view(16, -1, 32).sum(-1)

    by_ratio = torch.stack([errors(ratio) for ratio in CLIP_RATIOS])
    torch.testing.assert_close(errors("search"), by_ratio.amin(0), rtol=1e-5, atol=0)
    assert errors("search").sum() < 0.99 * by_ratio.sum((1, 2)).amin()
    assert torch.equal(errors(None), by_ratio[0]) and CLIP_RATIOS[0] == 1


@by_either
def test_a_ratio_shrinks_both_sides_of_a_range(prepare, monkeypatch):
    prepare(monkeypatch)
    weight = torch.linspace(-1.0, 1.0, 256).expand(8, 256)
    for fmt in WEIGHT_FORMATS.values():
        found = dequantized(quantize_weight(weight, fmt, clip=0.5), fmt, 256)
        assert 0.4 < found.max() < 0.6 and -0.6 < found.min() < -0.4
