"""On CPUs, products of a few rows with stored weights, each weight read once: within the error budget of fp32 sums, by
every level of instructions that this CPU has.
"""

import pytest
import torch
from oracle import activations, assert_product, generator
from test_cpu_products import LEVELS, WHY_NOT, weight_of

import ditq_kernels as ditq
from ditq_kernels import QuantLinear
from ditq_kernels.layer import cpu, cpu_extension, reference
from ditq_kernels.layer.cpu_extension import ACTIVATION_DTYPES, FEW_ROWS
from ditq_kernels.layer.error_budget import PLAIN
from ditq_kernels.layer.formats import WEIGHT_FORMATS

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
levels = pytest.mark.parametrize("level", LEVELS)
formats = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
# (M, N, K): inputs that end inside a group, a block of nibbles and what is decoded at a time.
SHAPES = ((1, 1, 1), (2, 5, 33), (3, 24, 200), (4, 40, 1152), (5, 16, 2049), (16, 33, 1025))


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@formats
@levels
def test_products(level, fmt, silu):
    biases = (None, *ACTIVATION_DTYPES)
    for number, (rows, outputs, inputs) in enumerate(SHAPES):
        if (fmt.group or 0) > inputs:
            continue
        weight = weight_of(fmt, outputs, inputs)
        w = reference.dequantize(weight)
        for place, dtype in enumerate(ACTIVATION_DTYPES):
            x = activations(rows, inputs, dtype, CPU)  # rows lie apart
            kind = biases[(number + place) % len(biases)]
            bias = None if kind is None else torch.randn(outputs, generator=generator(1)).to(kind)
            found = cpu_extension.linear_a16(x, weight, bias, silu, level)
            assert_product(found, x, w, bias, PLAIN, silu)


@formats
@levels
def test_one_input_gives_the_weight_itself(level, fmt):
    weight = weight_of(fmt, 24, 1200)
    eye = torch.eye(1200)
    found = torch.cat([cpu_extension.linear_a16(part, weight, None, level=level) for part in eye.split(FEW_ROWS)])
    assert torch.equal(found, reference.dequantize(weight).T)


@levels
@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_values_that_sums_cannot_hold_are_refused(level, dtype):
    weight = weight_of(WEIGHT_FORMATS["w4_g128"], 24, 208)
    x = torch.ones(9, 208, dtype=dtype)
    assert cpu_extension.linear_a16(x, weight, None, level=level).isfinite().all()
    for value in (torch.nan, torch.inf, -torch.inf, *(() if dtype == torch.float16 else (-1.1e30,))):
        for row, column in ((3, 7), (8, 207)):
            broken = x.clone()
            broken[row, column] = value
            assert cpu_extension.linear_a16(broken, weight, None, level=level) is None
    if dtype != torch.float16:
        x[5, 1] = -0.9e30
        assert cpu_extension.linear_a16(x, weight, None, level=level) is not None


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads_gives_the_same(threads, one_thread):
    weight, x = weight_of(WEIGHT_FORMATS["w8_g128"], 1300, 640), activations(5, 640, torch.float32, CPU)
    expected = cpu_extension.linear_a16(x, weight, None)
    torch.set_num_threads(threads)  # the fixture brings back what was
    assert torch.equal(cpu_extension.linear_a16(x, weight, None), expected)


def test_few_rows_are_taken_and_many_left_to_the_reference(monkeypatch):
    taken = []
    product = cpu_extension.linear_a16
    monkeypatch.setattr(cpu_extension, "linear_a16", lambda x, *rest: taken.append(len(x)) or product(x, *rest))
    weight = weight_of(WEIGHT_FORMATS["w4_g64"], 24, 192)
    for rows in (0, 1, FEW_ROWS, FEW_ROWS + 1, 100):
        x = activations(rows, 192, torch.bfloat16, CPU) if rows else torch.empty(0, 192, dtype=torch.bfloat16)
        y = cpu.linear_a16(x, weight, None)
        assert y.shape == (rows, 24) and y.dtype == x.dtype
        if rows > FEW_ROWS:
            assert torch.equal(y, reference.linear_a16(x, weight, None))
    assert cpu.linear_a16(x[:4].double(), weight, None).dtype == torch.float64
    assert taken == [1, FEW_ROWS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_whose_sums_would_overflow_are_left_to_the_reference(dtype):
    weight, x = weight_of(WEIGHT_FORMATS["w8"], 5, 129), torch.zeros(2, 129, dtype=dtype)
    x[0, 0], x[1, 3] = 1e37, torch.nan
    found, expected = cpu.linear_a16(x, weight, None), reference.linear_a16(x, weight, None)
    assert expected[0].isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_layers_of_few_rows_take_it_and_have_their_gradient(monkeypatch):
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 48), "w4a16_g128")
    x = torch.randn(2, 3, 256, generator=generator(2), requires_grad=True)
    y = layer(x)
    y.sum().backward()
    with ditq.use_backend("reference"):
        expected = layer(x.detach().requires_grad_())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad[0, 0], reference.dequantize(layer.packed_weight).sum(0), rtol=1e-4, atol=1e-4)


def test_a_library_of_older_sources_is_named(monkeypatch):
    monkeypatch.setattr(torch.ops, "ditq_cpu", object())
    assert "built from older sources; " in cpu_extension.why_unavailable.__wrapped__()
