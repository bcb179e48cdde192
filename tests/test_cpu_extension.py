"""The extension for CPUs rounds weights to the very codes that PyTorch's many passes give."""

import pytest
import torch
from oracle import generator

from ditq_kernels.layer import cpu_extension, quantizer
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.grid import DEFAULT_ZERO_POINT, INT8_RULES, RULE_NUMBERS, ZERO_POINT_RULES
from ditq_kernels.layer.quantizer import quantize_weight

pytestmark = [
    pytest.mark.skipif(cpu_extension.why_unavailable() is not None, reason=str(cpu_extension.why_unavailable())),
    pytest.mark.usefixtures("one_thread"),
]
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
SHAPES = ((37, 128), (5, 200), (64, 1152), (3, 4608), (130, 33))
PARTS = ("codes", "scale", "multiplier", "zero_point")


def weights(rows, columns, seed=0):
    """Channels and groups of different sizes that lean to one side, and rows that are special."""
    source = generator(seed)
    w = torch.randn(rows, columns, generator=source) * (0.01 + torch.rand(rows, 1, generator=source))
    w *= 1 + torch.arange(columns) // 32 % 3
    w += 0.3 * w.std(1, keepdim=True) * torch.randn(rows, 1, generator=source)
    w[0] = 0
    if rows > 4:
        w[1] = w[1].sign() * 0.5  # two values: many candidates are as good as others
        w[2] = (w[2] / w[2].abs().max() * 7).round() / 8  # on a grid
        w[3] *= 2.0**-130  # below the normal numbers
        w[4, ::3] = 0
    return w


def assert_same(found, expected):
    for name in PARTS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other), name


def by_passes(w, fmt, clip=None, zero_point=DEFAULT_ZERO_POINT):
    return quantizer._rounded(w.to(torch.float32), fmt, clip, zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@formats
def test_codes_and_scales_are_those_of_the_passes(fmt, shape, dtype):
    if (fmt.group or 0) > shape[1]:
        pytest.skip("the group is larger than K")
    w = weights(*shape).to(dtype)
    assert_same(quantize_weight(w, fmt), by_passes(w, fmt))


@pytest.mark.parametrize("clip", [0.9, 0.513, "search"])
@pytest.mark.parametrize("zero_point", ZERO_POINT_RULES)
@formats
def test_with_every_rule_and_clip(fmt, zero_point, clip):
    w = weights(40, 384, seed=1)
    assert_same(quantize_weight(w, fmt, clip=clip, zero_point=zero_point), by_passes(w, fmt, clip, zero_point))


@pytest.mark.parametrize("level", cpu_extension.WEIGHT_LEVELS)
@formats
def test_every_level_of_instructions_rounds_alike(fmt, level):
    if level not in cpu_extension.weight_levels():
        pytest.skip(f"this CPU has no {level} instructions")
    w = weights(64, 1152, seed=3)
    rules = ZERO_POINT_RULES["best"] if fmt.two_level else INT8_RULES
    numbers = [RULE_NUMBERS[rule] for rule in rules]
    *parts, doubtful, broken = cpu_extension.quantize_weight(w, fmt, numbers, (0.9,), level)
    certain = (~doubtful).nonzero().flatten()
    assert len(certain) > 50 and not broken.any()
    expected = by_passes(w, fmt, 0.9)
    for name, part in zip(PARTS, parts, strict=True):
        if part is not None:
            rows = 0 if name == "codes" else -1
            assert torch.equal(part.index_select(rows, certain), getattr(expected, name).index_select(rows, certain))


@pytest.mark.parametrize("name", ["w8", "w4_g128"])
def test_it_is_what_rounds(name, monkeypatch):
    """On weights as models have them, the order of a sum decides in next to no row."""
    fmt, w = WEIGHT_FORMATS[name], torch.randn(512, 1152, generator=generator(2))
    taken = []
    monkeypatch.setattr(
        quantizer, "_rounded", lambda w, *others, plain=quantizer._rounded: taken.append(len(w)) or plain(w, *others)
    )
    quantize_weight(w, fmt)
    assert sum(taken) <= 4


def test_rows_anywhere_in_memory():
    w = weights(64, 512)
    fmt = WEIGHT_FORMATS["w4_g64"]
    assert_same(quantize_weight(w[::3, 128:384], fmt), by_passes(w[::3, 128:384].contiguous(), fmt))
    assert_same(quantize_weight(w.T, fmt), by_passes(w.T.contiguous(), fmt))  # rows that are columns


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w8", "w8_g32", "w4", "w4_g128"])
def test_what_is_not_finite_is_refused(name, broken):
    w = weights(20, 256)
    w[17, 255] = broken
    with pytest.raises(ValueError, match="NaN or infinite values; nothing was quantized"):
        quantize_weight(w, WEIGHT_FORMATS[name])


def test_any_number_of_threads_gives_the_same(monkeypatch):
    w, fmt = weights(700, 1152), WEIGHT_FORMATS["w4_g32"]
    alone = quantize_weight(w, fmt)
    torch.set_num_threads(4)  # the fixture brings back what was
    assert_same(quantize_weight(w, fmt), alone)


@pytest.mark.parametrize("name", ["w8", "w8_g32", "w4"])
def test_the_scale_of_zeros_has_no_sign(name):
    """PyTorch's passes give the one zero or the other."""
    for w in (torch.zeros(3, 64), -torch.zeros(3, 64)):
        scale = quantize_weight(w, WEIGHT_FORMATS[name]).scale
        assert not scale.any() and not scale.signbit().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w8", "w8_g64", "w4", "w4_g128"])
def test_another_default_dtype_or_device_changes_nothing(name, dtype):
    w, fmt = weights(300, 256), WEIGHT_FORMATS[name]
    expected = quantize_weight(w, fmt)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert_same(quantize_weight(w, fmt), expected)
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert_same(quantize_weight(w, fmt), expected)
    assert_same(quantize_weight(w, fmt), expected)


@pytest.mark.parametrize("size", [1e18, 5e18, 1e19, 3e19, 1e30, 1e38])
@pytest.mark.parametrize("name", ["w8", "w4", "w4_g128", "w4_g32"])
def test_where_squares_overflow_the_first_candidate_stays(name, size):
    w, fmt = torch.randn(60, 384, generator=generator(4)).clamp(-3.3, 3.3) * size, WEIGHT_FORMATS[name]
    for clip in (None, "search"):
        assert_same(quantize_weight(w, fmt, clip=clip), by_passes(w, fmt, clip))


def test_what_it_takes(monkeypatch):
    weight = torch.ones(3, 128)
    assert cpu_extension.rounds(weight) and cpu_extension.rounds(weight[:1, :1])
    assert cpu_extension.rounds(weight.to(torch.bfloat16)) and cpu_extension.rounds(weight[:, :64])
    for other in (weight.to("meta"), weight.double(), weight.T.contiguous().T, weight[:0], weight.int()):
        assert not cpu_extension.rounds(other)
    monkeypatch.setattr(cpu_extension, "why_unavailable", lambda: "it is not built")
    assert not cpu_extension.rounds(weight)


@formats
def test_expanded_weights_are_rounded_as_what_they_are(fmt):
    """Neighbours in a row that are one place in memory."""
    w = weights(12, 128)[:, 5:6].expand(-1, 128)
    assert_same(quantize_weight(w, fmt), by_passes(w, fmt))


@pytest.mark.parametrize("fmt", [fmt for fmt in WEIGHT_FORMATS.values() if fmt.two_level], ids=lambda fmt: fmt.name)
def test_groups_on_one_side_of_zero(fmt):
    """Their zero point is the first or the last code, each with a largest multiplier of its own."""
    w = 0.1 + torch.rand(6, 256, generator=generator(4))
    w[3:] *= -1
    found = quantize_weight(w, fmt, zero_point="free")
    assert found.zero_point[:, :3].eq(0).all() and found.zero_point[:, 3:].eq(15).all()
    assert_same(found, by_passes(w, fmt, zero_point="free"))
