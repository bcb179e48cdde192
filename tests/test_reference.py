import pytest
import torch
from oracle import activations

from ditq_kernels.layer import reference
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.packed_weight import PackedWeight
from ditq_kernels.layer.packing import LAYOUTS

CPU = torch.device("cpu")


def test_codes_follow_the_definition_in_exact_arithmetic():
    x = activations(17, 200, torch.float32, CPU)
    codes, scales = reference.quantize_activation(x)
    for row in range(17):
        amax = x[row].abs().max()
        if amax == 0:
            assert not codes[row].any()
            continue
        # fp64 holds the fp32 quotient and the product of two fp32 numbers exactly, and rounds each to fp32 once.
        factor = (torch.tensor(127.0, dtype=torch.float64) / amax.double()).float()
        product = (x[row].double() * factor.double()).float()
        assert torch.equal(codes[row], torch.round(product).to(torch.int8))
        assert scales[row] == (amax.double() / 127).float()
        assert codes[row].abs().max() == 127


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert reference.quantize_activation(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_static_reach_saturates():
    x = torch.tensor([[1.0, -300.0, 3.0e38, 127.0]])
    codes, scales = reference.quantize_activation(x, torch.tensor([127.0]))
    assert codes.tolist() == [[1, -127, 127, 127]] and scales.tolist() == [1.0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("amax", [None, torch.tensor([4.0])])
def test_a_broken_row_is_marked_and_no_other(poison, amax):
    x = activations(5, 64, torch.float32, CPU)
    x[3, 7] = poison
    codes, scales = reference.quantize_activation(x, amax)
    assert torch.isnan(scales).tolist() == [False, False, False, True, False]
    assert not codes[3].any()


def test_rows_too_small_to_divide_by_are_finite():
    x = torch.full((2, 64), 1e-44)
    x[1] = 0
    codes, scales = reference.quantize_activation(x)
    assert not codes.any() and torch.isfinite(scales).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 17])
def test_the_product_is_exact_at_the_extremes(rows, fast, monkeypatch):
    monkeypatch.setattr(reference, "_int_mm_is_fast", lambda: fast)
    in_features = 4608
    qx = torch.full((rows, in_features), 127, dtype=torch.int8)
    w = torch.full((8, in_features), -128, dtype=torch.int8)
    w[::2] = 127
    exact = (qx.long() @ w.long().T).int()
    known, multiplied = reference._int_mm_is_exact(), []
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *operands: multiplied.append(1) or product(*operands))
    assert torch.equal(reference.int8_product(qx, w), exact) and bool(multiplied) == (fast and known)
    multiplied.clear()
    assert reference.int8_product(qx[:0], w).shape == (0, 8) and reference.int8_product(qx, w[:0]).shape == (rows, 0)
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
    assert torch.equal(reference.int8_product(qx, w), exact) and not multiplied


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_products_of_known_parts(name):
    """From codes, groups and scales drawn at random: 64-bit integers, and single fp32 steps in the documented order."""
    fmt, generator = WEIGHT_FORMATS[name], torch.Generator().manual_seed(5)
    rows, outputs, inputs = 7, 12, 200

    def drawn(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    group = torch.arange(inputs) // (fmt.group or inputs)
    groups, scale = fmt.group_count(inputs), torch.rand(outputs, generator=generator) + 0.5
    if fmt.two_level:
        codes, multiplier, zero = (
            drawn(0, 16, outputs, inputs),
            drawn(1, 9, groups, outputs),
            drawn(0, 16, groups, outputs),
        )
        integers = multiplier[group].T * (codes - zero[group].T)
        group_code, stored = ((multiplier - 1) * 16 + zero).to(torch.uint8), codes.to(torch.uint8)
    else:
        integers, group_code = drawn(-127, 128, outputs, inputs), None
        stored = integers.to(torch.int8)
        scale = torch.rand(groups, outputs, generator=generator) + 0.5 if fmt.promoted else scale
    weight = PackedWeight(LAYOUTS[fmt.layout].pack(stored), scale, group_code, fmt, inputs)
    dense = integers * (scale[group].T if fmt.promoted else scale.unsqueeze(1))
    assert torch.equal(reference.dequantize(weight), dense)

    qx, sx, bias = drawn(-127, 128, rows, inputs), torch.rand(rows, generator=generator), torch.randn(outputs)
    if fmt.promoted:
        total = torch.zeros(rows, outputs)
        for index in range(groups):
            total = total + (qx[:, group == index] @ integers[:, group == index].T).float() * scale[index]
        exact = total * sx.unsqueeze(1)
    else:
        accumulator = (qx @ integers.T).to(torch.int32)
        exact = accumulator.float() * sx.unsqueeze(1) * scale
        found = reference.linear_a8(qx.to(torch.int8), sx, weight, bias, torch.int32)
        assert found.dtype == torch.int32 and torch.equal(found, accumulator)
    for dtype in (torch.float32, torch.bfloat16):
        for added in (None, bias, bias.to(torch.float16)):
            found = reference.linear_a8(qx.to(torch.int8), sx, weight, added, dtype)
            expected = exact if added is None else exact + added.float()
            assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    # Sums of 200 terms of up to 200, in fp32 and in an order of its own: a term that is wrong is off by more.
    x = torch.randn(rows, inputs, generator=generator)
    for silu, entering in ((False, x), (True, x * torch.sigmoid(x))):
        found = reference.linear_a16(x, weight, bias, silu)
        torch.testing.assert_close(found.double(), entering.double() @ dense.double().T + bias, rtol=1e-4, atol=1e-2)
    grad = torch.randn(rows, outputs, generator=generator)
    torch.testing.assert_close(
        reference.grad_input(grad, weight).double(), grad.double() @ dense.double(), rtol=1e-4, atol=1e-2
    )


def test_the_order_of_the_scales_shows():
    """Each step is rounded: sx comes first. Two factors whose product with the sum depends on the order, found here."""
    generator = torch.Generator().manual_seed(6)
    accumulator, sx, scale = torch.randint(1, 1000, (99,), generator=generator), *torch.rand(2, 99, generator=generator)
    first, last = accumulator.float() * sx * scale, accumulator.float() * scale * sx
    assert (first != last).any()
    for a, s, c, expected in zip(accumulator, sx, scale, first, strict=True):
        qx = torch.full((1, 128), 0, dtype=torch.int8)
        qx[0, : a // 100], qx[0, 100] = 100, a % 100
        weight = PackedWeight(torch.ones(1, 128, dtype=torch.int8), c.reshape(1), None, WEIGHT_FORMATS["w8"], 128)
        assert reference.linear_a8(qx, s.reshape(1), weight, None, torch.float32).item() == expected


def test_a_modulated_norm_of_known_parts():
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    weight, bias = torch.randn(2, 40)
    shift, scale = torch.randn(2, 2, 40)
    normed = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-3).sqrt()
    affine = normed * weight + bias
    for parts, expected in (
        ((None, None, None, None), normed),
        ((weight, bias, None, None), affine),
        ((None, None, shift, None), normed + shift.unsqueeze(1)),
        ((None, None, None, scale), normed * (1 + scale.unsqueeze(1))),
        ((weight, bias, shift, scale), affine * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)),
    ):
        found = reference.norm_modulate(x.float(), *parts, 1e-3)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        codes, scales = reference.norm_modulate_quantize(x.float(), *parts, None, 1e-3)
        for one, other in zip((codes, scales), reference.quantize_activation(found.flatten(0, 1)), strict=True):
            assert torch.equal(one, other)
    codes, scales = reference.gelu_quantize(x.float().flatten(0, 1), None, "none")
    exact = (x * 0.5 * (1 + torch.erf(x / 2**0.5))).flatten(0, 1)
    assert (codes * scales.unsqueeze(1) - exact).abs().max() <= 0.501 * scales.max()


def test_one_column_is_not_left_to_pytorch(monkeypatch):
    """As the last group of a weight may be. PyTorch 2.11 reads it at a wrong stride on a CPU with AMX."""
    monkeypatch.setattr(reference, "_int_mm_is_fast", lambda: True)
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: torch.full((x.shape[0], w.shape[1]), 7, dtype=torch.int32))
    x, w = (torch.arange(-5, 60, 5).to(torch.int8).view(-1, 13)[:, 12:] for _ in range(2))
    assert reference.int8_product(x, w).tolist() == [[55 * 55]]
    assert reference.int8_product(x.expand(-1, 2), w.expand(-1, 2)).tolist() == [[7]]


def test_whether_int8_products_are_exact_here():
    """Asked of other shapes and numbers, where sums of two products pass 16 bits."""
    x, w = torch.full((40, 96), -127, dtype=torch.int8), torch.full((24, 96), -128, dtype=torch.int8)
    try:
        exact = torch.equal(torch._int_mm(x, w.T), torch.full((40, 24), 96 * 127 * 128, dtype=torch.int32))
    except RuntimeError:
        exact = False
    assert reference._int_mm_is_exact() == exact


def test_rows_up_to_the_smallest_reach_have_its_scale():
    """2**-100: the smallest that is left as it is."""
    x = torch.tensor([[2.0**-99, 0.0], [2.0**-100, -(2.0**-101)], [2.0**-101, 0.0]])
    codes, scales = reference.quantize_activation(x)
    assert codes.tolist() == [[127, 0], [127, -64], [64, 0]]
    assert torch.equal(scales * 127 / 2.0**-100, torch.tensor([2.0, 1.0, 1.0]))
