"""Kernels that quantize behind GELU, or behind LayerNorm and modulation, against the fp64 oracle and the reference."""

import pytest
import torch
import torch.nn.functional as F
from oracle import COMPILED, activations, assert_within_budget, generator

from ditq_kernels import UnsupportedError, kernels
from ditq_kernels.kernels import activation
from ditq_kernels.kernels import config as kernel_config
from ditq_kernels.layer import contracts, error_budget, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
MODULES = (kernels, reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
static = pytest.mark.parametrize("static", [False, True], ids=["token", "static"])


def check_codes(codes, scales, exact, error, amax):
    """``exact``, fp64 [rows, columns], was quantized; fp32 has put it off by ``error``, fp64 [rows], at most."""
    assert error_budget.worst_share_of_codes(codes, scales, exact, error, reference.SMALLEST_AMAX, amax) <= 1


@pytest.mark.parametrize("approximate", contracts.GELU_FORMS)
@static
@dtypes
@pytest.mark.parametrize("columns", [200, 20000] if COMPILED else [1, 200, 1152, 20000])
def test_gelu_and_quantization(columns, dtype, static, approximate, device):
    x = activations(7, columns, dtype, device)
    amax = torch.tensor([2.5], device=device) if static else None
    exact = F.gelu(x.double(), approximate=approximate)
    for module in MODULES:
        check_codes(*module.gelu_quantize(x, amax, approximate), exact, error_budget.gelu_error(x), amax)


@static
@dtypes
@pytest.mark.parametrize("columns, first", [(200, 72), (1152, 1), (20000, 384)] if COMPILED else [(200, 72), (1152, 1)])
def test_gelu_behind_other_columns(columns, first, dtype, static, device):
    x = activations(7, columns, dtype, device)
    wide = 3 * torch.randn(7, first + 40, generator=generator(2)).to(device, dtype)
    wide[5, 8] = float("nan")
    before = wide[:, 8 : first + 8]
    amax = torch.tensor([2.5], device=device) if static else None
    exact = torch.cat([before.double(), F.gelu(x.double(), approximate="tanh")], 1)
    for module in MODULES:
        for given in (before, wide.t().contiguous().t()[:, 8 : first + 8]):
            codes, scales = module.gelu_quantize(x, amax, "tanh", given)
            assert scales[5].isnan() and not codes[5].any()
            whole = torch.arange(7, device=device) != 5
            error = error_budget.gelu_error(x)[whole]
            check_codes(codes[whole], scales[whole], exact[whole], error, amax)


def modulation(batch, columns, dtype, device):
    """(shift, scale) as a DiT hands them on: slices of one wider tensor."""
    wide = torch.randn(batch, 6 * columns, generator=generator(1)).to(device, dtype)
    return wide[:, columns : 2 * columns], wide[:, 2 * columns : 3 * columns]


def norm_exact(x, weight, bias, shift, scale):
    parts = [None if part is None else part.double() for part in (weight, bias, shift, scale)]
    y = F.layer_norm(x.double(), x.shape[-1:], parts[0], parts[1], EPS)
    y = y if parts[3] is None else y * (1 + parts[3].unsqueeze(1))
    return y if parts[2] is None else y + parts[2].unsqueeze(1)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@static
@dtypes
@pytest.mark.parametrize("shape", [(3, 4, 200), (1, 3, 1152)] + [(2, 5, 64)] * (not COMPILED))
def test_norm_modulate_and_quantization(shape, dtype, static, modulated, affine, device):
    batch, tokens, columns = shape
    x = activations(batch * tokens, columns, dtype, device).unflatten(0, (batch, tokens))
    weight, bias = modulation(1, columns, dtype, device) if affine else (None, None)
    parts = (*(None if part is None else part[0] for part in (weight, bias)),)
    parts += modulation(batch, columns, dtype, device) if modulated else (None, None)
    amax = torch.tensor([3.0], device=device) if static else None
    exact = norm_exact(x, *parts).flatten(0, 1)
    error, budget = error_budget.norm_error(exact), error_budget.norm_budget(exact, dtype)
    for module in MODULES:
        check_codes(*module.norm_modulate_quantize(x, *parts, amax, EPS), exact, error, amax)
        assert_within_budget(module.norm_modulate(x, *parts, EPS).flatten(0, 1), exact, budget)


def test_norms_of_more_batches_than_a_grid_is_wide(monkeypatch):
    """A grid has at most 65535 thread blocks along y and z."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(activation, "norm_modulate_kernel", Kernel())
    kernels.norm_modulate(torch.zeros(70000, 2, 8), None, None, None, None, EPS)
    assert grids == [(140000,)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is put in on purpose
@pytest.mark.parametrize("module", MODULES, ids=["kernels", "reference"])
def test_a_broken_row_gets_the_scale_nan(module, device):
    x = torch.randn(1, 4, 96, device=device)
    x[0, 1, 3] = float("inf")
    x[0, 2, 5] = float("nan")
    broken = torch.tensor([False, True, True, False], device=device)
    codes, scales = module.norm_modulate_quantize(x, None, None, None, None, None, EPS)
    assert torch.equal(torch.isnan(scales), broken) and not codes[broken].any()
    for value in (float("-inf"), float("inf"), float("nan")):
        x[0, 1, 3] = value
        for approximate in contracts.GELU_FORMS:
            codes, scales = module.gelu_quantize(x[0], None, approximate)
            assert torch.equal(torch.isnan(scales), broken) and not codes[broken].any()


@pytest.mark.parametrize("module", MODULES, ids=["kernels", "reference"])
def test_any_strides_and_empty_batches(module, device):
    x = torch.randn(2, 48, 6, device=device).transpose(1, 2)
    shift = torch.randn(48, 2, device=device).T
    straight = module.norm_modulate(x.contiguous(), None, None, shift.contiguous(), None, EPS)
    assert torch.equal(module.norm_modulate(x, None, None, shift, None, EPS), straight)
    strided, contiguous = (module.gelu_quantize(y.reshape(-1, 6).T, None, "tanh") for y in (x, x.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))
    assert module.norm_modulate(x[:, :0], None, None, shift, None, EPS).shape == (2, 0, 48)
    codes, scales = module.norm_modulate_quantize(x[:0], None, None, None, None, None, EPS)
    assert codes.shape == (0, 48) and scales.shape == (0,)


def test_rows_that_do_not_fit_a_program_are_refused(device, monkeypatch):
    monkeypatch.setattr(activation, "MAX_ACTIVATION_BLOCK", 64)
    with pytest.raises(UnsupportedError, match="up to 64 columns, got 65"):
        kernels.norm_modulate(torch.randn(1, 2, 65, device=device), None, None, None, None, EPS)
    assert kernel_config.MAX_ACTIVATION_BLOCK >= 15360  # FLUX's proj_out


def test_bad_input_is_named():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"shift must be \[2, 8\]"):
        torch.ops.ditq.norm_modulate(x, None, None, torch.randn(8), None, EPS)
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, channels\]"):
        torch.ops.ditq.norm_modulate_quantize(x[0], None, None, None, None, None, EPS)
    with pytest.raises(ValueError, match="unknown GELU approximation 'erf'; allowed: none, tanh"):
        torch.ops.ditq.gelu_quantize(x[0], None, "erf")
