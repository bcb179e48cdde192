"""The error budget itself: wide enough for what rounds as it should, and too narrow for a small mistake."""

import pytest
import torch
import torch.nn.functional as F
from oracle import activations, generator, linear

from ditq_kernels import QuantLinear
from ditq_kernels.kernels.config import CONFIGS, GRADIENT_TILE, arithmetic
from ditq_kernels.layer.error_budget import (
    MATRIX_UNITS,
    PLAIN,
    Arithmetic,
    lost_per_product,
    product_oracle,
    rounding,
    silu_operand,
    worst_share,
)

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = (FP32, BF16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def operands(dtype, in_features=1152):
    """(x [20, K] in ``dtype``, fp32 weight [24, K], its scale [24], fp32 bias [24])."""
    layer = QuantLinear.from_linear(linear(24, in_features, CPU), "w8a8")
    return activations(20, in_features, dtype, CPU), layer.dequantized_weight(), layer.scale, layer.bias.detach()


def summed(terms, step):
    """The sum of ``terms`` [..., K] in their order, whatever ``step`` makes of each partial one."""
    total = torch.zeros_like(terms[..., 0])
    for k in range(terms.shape[-1]):
        total = step(total + terms[..., k], k)
    return total


@dtypes
def test_one_sum_after_another_is_within_it(dtype):
    x, w, _, bias = operands(dtype)
    terms = x.float().unsqueeze(1) * w
    y = (summed(terms, lambda total, k: total) + bias).to(dtype)
    assert worst_share(y, *product_oracle(x, w, bias, dtype)) <= 1


def shared_mistakes(x, w, scale, bias):
    """fp32 products that are right but for one thing."""
    terms = x.float().unsqueeze(1) * w
    yield "one product lost", terms[..., :-1].sum(-1) + bias
    yield "scale in bf16", F.linear(x.float(), w / scale.unsqueeze(1)) * scale.to(BF16).float() + bias
    yield (
        "accumulator in bf16 after every 128",
        summed(terms, lambda total, k: total.to(BF16).float() if k % 128 == 127 else total) + bias,
    )
    yield "bias in bf16", F.linear(x.float(), w) + bias.to(BF16).float()
    group = slice(128, 256)
    other = w.clone()
    other[7, group] *= 9 / 8  # the multiplier next to 8
    yield "a wrong group in one channel", F.linear(x.float(), other) + bias


def test_small_mistakes_are_not():
    x, w, scale, bias = operands(FP32)
    oracle = product_oracle(x, w, bias, FP32)
    for name, y in shared_mistakes(x, w, scale, bias):
        assert worst_share(y, *oracle) > 1, name


@dtypes
def test_values_may_be_rounded_once_and_not_twice(dtype):
    x, w, _, _ = operands(dtype, 16)
    exact, budget = product_oracle(x, w, None, dtype)
    assert worst_share(exact.float().to(dtype), exact, budget) <= 1
    if dtype != FP32:
        coarse = {BF16: torch.float8_e5m2, torch.float16: BF16}[dtype]
        assert worst_share(exact.float().to(coarse).to(dtype), exact, budget) > 1


def test_zeros_and_what_is_not_finite():
    exact = budget = torch.zeros(2, 3, dtype=torch.float64)
    y = torch.zeros(2, 3)
    assert worst_share(y, exact, budget) == 0 and worst_share(y[:0], exact[:0], budget[:0]) == 0
    for value in (1e-30, float("nan"), float("inf")):
        y[1, 1] = value
        assert worst_share(y, exact, budget) == float("inf")


@dtypes
def test_roundings_of_operands_are_the_arithmetics(dtype):
    x, w, _, bias = operands(dtype)
    rounded = Arithmetic(rounds_weight=True, rounds_bias=True)
    exact, _ = product_oracle(x, w, bias, dtype, rounded)
    assert torch.equal(exact, product_oracle(x, w.to(dtype).float(), bias.to(dtype).float(), dtype)[0])


@dtypes
def test_silu_is_within_its_uncertainty(dtype):
    x = torch.cat((activations(40, 500, dtype, CPU), torch.linspace(-95, 95, 500).to(dtype).unsqueeze(0)))
    value, error = silu_operand(x)
    assert ((F.silu(x).double() - value).abs() <= error).all()
    if dtype != FP32:  # most values leave no choice
        assert (error == 0).double().mean() > 0.9


def cut_off(value, unit):
    return (value / unit).trunc() * unit


def matrix_unit(products, bits):
    """fp64 [...]: the sum of fp64 ``products`` [..., steps, products of a step], as MATRIX_UNITS describes it."""

    def exponent(magnitude):
        return torch.exp2(torch.frexp(magnitude).exponent.double() - 1)

    total = torch.zeros_like(products[..., 0, 0])
    for step in range(products.shape[-2]):
        summands = torch.cat((products[..., step, :], total.unsqueeze(-1)), -1)
        largest = exponent(summands.abs().amax(-1, keepdim=True))
        total = cut_off(summands, largest * 2.0**-bits).sum(-1)
        total = cut_off(total, exponent(total.abs()) * 2.0**-23)
    return total


@pytest.mark.parametrize("major", MATRIX_UNITS)
def test_sums_of_matrix_units_are_within_the_term_for_them(major):
    """Of one sign, where what is cut off adds up."""
    at_a_time, bits = MATRIX_UNITS[major]
    x, w = (torch.rand(6, 8192, generator=generator(seed)).to(BF16) for seed in (0, 1))
    products = (x.double().unsqueeze(1) * w.double()).unflatten(-1, (-1, at_a_time))
    y = matrix_unit(products, bits).float()
    with_matrix_units = Arithmetic(matrix_instructions=True)
    assert worst_share(y, *product_oracle(x, w, None, FP32, with_matrix_units, 10 * major)) <= 1
    assert worst_share(y, *product_oracle(x, w, None, FP32)) > 1
    assert torch.equal(
        product_oracle(x, w, None, FP32, with_matrix_units)[1], product_oracle(x, w, None, FP32, PLAIN, 10 * major)[1]
    )


def test_a_matrix_unit_that_is_not_listed_gets_the_coarsest():
    known = [lost_per_product(10 * major) for major in MATRIX_UNITS]
    assert lost_per_product(75) == lost_per_product(130) == max(known) == lost_per_product(89)
    assert lost_per_product(103) == lost_per_product(100) < lost_per_product(80)


def test_every_route_has_its_arithmetic():
    for config in (*(config for configs in CONFIGS.values() for config in configs), GRADIENT_TILE):
        does = arithmetic(config, 2)
        assert does.rounds_weight == (config.route in ("expanded", "gradient"))
        assert does.rounds_bias == (str(config) == "expanded")
        assert does.matrix_instructions == (config.route != "small")
        assert arithmetic(config, 1) == arithmetic(config, 4) == PLAIN


@dtypes
def test_a_rounding_is_half_a_unit_of_the_last_place(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    above_one = 1 + torch.finfo(dtype).eps / 2
    for value in (above_one, smallest / 2, 3 * above_one):
        value = torch.tensor([value], dtype=torch.float64)
        assert (value.to(dtype).double() - value).abs() <= rounding(value, dtype)
    assert rounding(torch.ones(1, dtype=torch.float64), dtype) == torch.finfo(dtype).eps / 2
