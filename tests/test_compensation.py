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
