"""Error-compensated rounding: what is computed by the factor of the moment, and by the extension for CPUs."""

import pytest
import torch
from oracle import generator

from ditq_kernels.layer import compensation, cpu_extension
from ditq_kernels.layer.grid import ZERO_POINT_RULES, fit_grid

with_extension = pytest.mark.skipif(
    cpu_extension.why_unavailable() is not None, reason=str(cpu_extension.why_unavailable())
)


def by_inverses(w, grid, moment):
    """In fp64, GPTQ as it is told (Frantar et al., arXiv 2210.17323): by the inverse moment of the columns left."""
    w, moment = w.double().clone(), moment.double()
    damped = moment + compensation.DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    left = damped.diagonal().argsort(descending=True, stable=True)
    codes = torch.empty_like(w)
    while len(left):
        k, left = left[0], left[1:]
        inverse = torch.linalg.inv(damped[torch.cat([k[None], left])][:, torch.cat([k[None], left])])
        step, zero = (part[:, k // grid.group].double() for part in (grid.step, grid.zero))
        codes[:, k] = ((w[:, k] / step).round() + zero).clamp(grid.low, grid.high)
        error = w[:, k] - (codes[:, k] - zero) * step
        w[:, left] -= error[:, None] * inverse[0, 1:] / inverse[0, 0]
    return codes.float()


@pytest.mark.parametrize("extension", [pytest.param(True, marks=with_extension), False], ids=["extension", "PyTorch"])
@pytest.mark.parametrize("inputs", [33, 160, 300])
def test_codes_are_those_of_the_step_by_step_definition(extension, inputs, monkeypatch):
    """Over one, two and three blocks; a sum that falls on the middle of two codes may fall to either."""
    monkeypatch.setattr(cpu_extension, "rounds", lambda weight: extension)
    source = generator(3)
    w = torch.randn(37, inputs, generator=source)
    x = torch.randn(400, inputs, generator=source) @ torch.randn(inputs, inputs, generator=source)
    x *= 0.2 + torch.rand(inputs, generator=source)
    grid = fit_grid(w, 32, ZERO_POINT_RULES["free"], None, 0, 15)
    codes = compensation.compensated_codes(w, grid, x.T @ x)
    expected = by_inverses(w, grid, x.T @ x)
    assert (codes != grid.round(w)).float().mean() > 0.2  # it does something
    assert (codes != expected).float().mean() < 0.002


@with_extension
@pytest.mark.parametrize("level", cpu_extension.WEIGHT_LEVELS)
@pytest.mark.parametrize("columns", [1, 5, 128])
@pytest.mark.parametrize("rows", [1, 31, 64, 97])
def test_levels_round_to_the_same_bits(level, columns, rows):
    """Of values whose sums are exact in any order."""
    if level not in cpu_extension.weight_levels():
        pytest.skip(f"this CPU does not run {level}")
    source = generator(rows)

    def eighths(*shape):
        return torch.randint(-64, 65, shape, generator=source) / 8

    exact, wanted = eighths(columns, rows), eighths(columns, rows)
    within = torch.randint(-4, 5, (columns, columns), generator=source) / 8
    step = 2.0 ** torch.randint(-3, 2, (columns, rows), generator=source)
    zero = torch.randint(0, 16, (columns, rows), generator=source).float()
    found, expected = (torch.full((2, columns, rows), float("nan")) for _ in range(2))
    compensation._round_block(exact, wanted.clone(), within, step, zero, (0, 15), *expected)
    cpu_extension.compensate(exact, wanted, within, step, zero, (0, 15), *found, level=level)
    assert torch.equal(found, expected)


def test_autocast_and_the_default_dtype_change_nothing():
    w = torch.randn(20, 300, generator=generator(5))
    x = torch.randn(500, 300, generator=generator(6)) * torch.linspace(0.1, 2, 300)
    moment = x.T @ x
    expected = compensation.compensated_codes(w, fit_grid(w, 32, ZERO_POINT_RULES["best"], None, 0, 15), moment)
    torch.set_default_dtype(torch.float64)
    try:
        grid = fit_grid(w, 32, ZERO_POINT_RULES["best"], None, 0, 15)
    finally:
        torch.set_default_dtype(torch.float32)
    assert grid.zero.dtype == grid.step.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compensation.compensated_codes(w, grid, moment), expected)


def test_moments_of_any_size():
    """Those that fp32 does not hold, too: only what they have in common counts."""
    w = torch.randn(20, 200, generator=generator(5))
    x = torch.randn(500, 200, generator=generator(6), dtype=torch.float64) * torch.linspace(0.1, 2, 200)
    grid = fit_grid(w, 200, ZERO_POINT_RULES["free"], None, 0, 15)
    expected, *others = (
        compensation.compensated_codes(w, grid, x.T @ x * factor) for factor in (1, 2.0**300, 2.0**-300)
    )
    assert all(torch.equal(other, expected) for other in others)


def test_memory_is_what_is_said():
    """Of the factor; a few rows at a time are copied beside it."""
    inputs = 3000
    moment = torch.eye(inputs) + 0.1
    with torch.profiler.profile(profile_memory=True) as profile:
        compensation._taken(moment, moment.diagonal().double(), torch.arange(inputs))
    held = most = 0
    memory = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(memory, key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert compensation.compensation_bytes(inputs) <= most < 1.25 * compensation.compensation_bytes(inputs)


@with_extension
def test_a_block_that_would_be_misread_is_refused():
    parts = [torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 4), *(torch.ones(4, 8) for _ in range(2))]
    with pytest.raises(TypeError, match=r"must be torch\.float32 and contiguous"):
        cpu_extension.compensate(parts[0], parts[1].bfloat16(), *parts[2:], (0, 15), *torch.ones(2, 4, 8))
