"""On CPUs, passes that quantize what they compute, by every level of instructions, against the fp64 oracle."""

import pytest
import torch
import torch.nn.functional as F
from oracle import activations
from test_fused_activations import DTYPES, EPS, check_codes, modulation, norm_exact

from ditq_kernels.layer import cpu, cpu_extension, error_budget, reference

WHY_NOT = cpu_extension.why_no_products()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("poisoned_memory"),
]
levels = pytest.mark.parametrize("level", () if WHY_NOT else cpu_extension.product_levels())
dtypes = pytest.mark.parametrize("dtype", DTYPES)
static = pytest.mark.parametrize("static", [False, True], ids=["token", "static"])
CPU = torch.device("cpu")
COLUMNS = (1, 7, 8, 9, 63, 64, 65, 200, 1152, 15360)


@levels
@static
@dtypes
@pytest.mark.parametrize("columns", COLUMNS)
def test_gelu_and_quantization(columns, dtype, static, level):
    x = activations(7, columns, dtype, CPU)
    amax = torch.tensor([2.5]) if static else None
    exact = F.gelu(x.double(), approximate="tanh")
    check_codes(*cpu_extension.gelu_quantize(x, amax, level), exact, error_budget.gelu_error(x), amax)


@levels
def test_gelu_of_every_magnitude(level):
    """Alone in its row, a value is the row's reach: its scale shows every bit of it."""
    sizes = torch.logspace(-30, 30, 6001, dtype=torch.float64).to(torch.float32)
    x = torch.cat((sizes, -sizes, torch.linspace(-12, 12, 24001), torch.zeros(1)))[:, None]
    codes, scales = cpu_extension.gelu_quantize(x, None, level)
    wide = x.double()
    exponent = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(exponent)  # 1 + tanh, that PyTorch computes with, cancels
    # An exponential is as far off as its exponent, which is of four roundings; as many again around it.
    allowed = (4 * exponent.abs() + 8) * 2.0**-24 * exact.abs()
    far_off = ((codes * scales[:, None]).double() - exact).abs() > allowed
    assert not far_off[(exponent.abs() < 80) & (exact.abs() > reference.SMALLEST_AMAX)].any()


@levels
@static
@dtypes
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 4, 200), (1, 3, 1152), (2, 5, 64), (2, 2, 9), (1, 70, 2241), (5, 1, 130)], ids=str
)
def test_norm_modulate_and_quantization(shape, modulated, affine, dtype, static, level):
    batch, tokens, columns = shape
    x = activations(batch * tokens, columns, dtype, CPU).unflatten(0, (batch, tokens))
    parts = tuple(part[0] for part in modulation(1, columns, dtype, CPU)) if affine else (None, None)
    parts += modulation(batch, columns, dtype, CPU) if modulated else (None, None)
    amax = torch.tensor([3.0]) if static else None
    exact = norm_exact(x, *parts).flatten(0, 1)
    found = cpu_extension.norm_modulate_quantize(x, *parts, amax, EPS, level)
    check_codes(*found, exact, error_budget.norm_error(exact), amax)


@levels
def test_each_part_of_the_modulation_alone(level):
    x = activations(6, 96, torch.float32, CPU).view(2, 3, 96)
    given = {"weight": modulation(1, 96, torch.float32, CPU)[0][0], "bias": modulation(1, 96, torch.float32, CPU)[1][0]}
    given |= dict(zip(("shift", "scale"), modulation(2, 96, torch.float32, CPU), strict=True))
    for name in given:
        parts = [given[name] if one == name else None for one in ("weight", "bias", "shift", "scale")]
        exact = norm_exact(x, *parts).flatten(0, 1)
        found = cpu_extension.norm_modulate_quantize(x, *parts, None, EPS, level)
        check_codes(*found, exact, error_budget.norm_error(exact), None)


@levels
def test_a_broken_row_gets_the_scale_nan(level):
    for columns in (96, 99):
        for value in (float("-inf"), float("inf"), float("nan")):
            for place in (3, columns - 1):
                x = torch.randn(1, 3, columns)
                x[0, 1, place] = value
                for codes, scales in (
                    cpu_extension.norm_modulate_quantize(x, None, None, None, None, None, EPS, level),
                    cpu_extension.gelu_quantize(x[0], None, level),
                ):
                    assert torch.isnan(scales).tolist() == [False, True, False] and not codes[1].any()
                    assert codes[[0, 2]].any(1).all()


def test_any_strides_and_empty_batches():
    x = torch.randn(2, 48, 6).transpose(1, 2)
    shift = torch.randn(48, 2).T
    normed = [
        cpu.norm_modulate_quantize(given, None, None, part, None, None, EPS)
        for given, part in ((x, shift), (x.contiguous(), shift.contiguous()))
    ]
    gelus = [cpu.gelu_quantize(given, None, "tanh") for given in (x[0], x[0].contiguous())]
    for found, expected in (normed, gelus):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    codes, scales = cpu.norm_modulate_quantize(x[:0], None, None, None, None, None, EPS)
    assert codes.shape == (0, 48) and scales.shape == (0,)
    codes, scales = cpu.gelu_quantize(x[0, :0], None, "tanh")
    assert codes.shape == (0, 48) and scales.shape == (0,)


def test_any_number_of_threads_gives_the_same():
    x = torch.randn(2, 400, 320)
    shift, scale = torch.randn(2, 2, 320)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(
                (
                    *cpu.norm_modulate_quantize(x, None, None, shift, scale, None, EPS),
                    *cpu.gelu_quantize(x.flatten(0, 1), None, "tanh"),
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
