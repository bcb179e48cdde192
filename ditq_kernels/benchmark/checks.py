"""Whether a result is right: no speed is reported of one that is not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layer import reference
from ..layer.error_budget import worst_share, worst_share_of_codes

CHECKED_ROWS = 512  # compared with the oracle; all others have to be finite
# Largest ‖y - exact‖ / ‖exact‖ against a product of the unrounded operands, of Gaussian data. A symmetric code of b
# bits over a group whose largest magnitude is r standard deviations errs by about r / (2**(b - 1) * sqrt(12)): 0.9 %
# with 8 bits and r = 4 (two operands: 1.2 %), 10 % with 4 bits and r = 2.7.
OPERANDS_16_BIT = 0.01
OPERANDS_8_BIT = 0.02
# fp8 products with fast accumulation, of exactly their fp8 operands: Hopper's tensor cores keep about 14 bits of a sum,
# and lose up to about 2 % at K = 4096 (DeepSeek-V3 technical report, section 3.3.2).
FP8_FAST_SUMS = 0.03
WEIGHTS_4_BIT = 0.15


@dataclass(frozen=True)
class Check:
    """Attributes:
    passed: whether the error was within the budget.
    error: ‖y - exact‖ / ‖exact‖, or of codes the largest share of their error budget.
    budget: what was allowed, in words.
    """

    passed: bool
    error: float
    budget: str

    def __str__(self) -> str:
        return f"error {self.error:.3g}, allowed: {self.budget}"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer, so that an element that a kernel forgets is seen."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def checked_rows(rows: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Indices of the rows to compare, ascending: all of few, else the first, the last, and others drawn evenly."""
    if rows <= CHECKED_ROWS:
        return torch.arange(rows, device=device)
    inner = torch.randperm(rows - 2, generator=torch.Generator().manual_seed(seed))[: CHECKED_ROWS - 2] + 1
    return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([rows - 1]))).to(device)


def _norm_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.to(torch.float64) - exact).norm() / exact.norm().clamp(min=1e-300))


def check_product(
    y: torch.Tensor,
    picked: torch.Tensor,
    exact: torch.Tensor,
    budget: torch.Tensor | None,
    allowed: float | None,
) -> Check:
    """Compare ``y`` [M, N] on the rows ``picked`` with ``exact``, fp64 [rows, N].

    Args:
        budget: what each element may be off by, fp64 [rows, N] (:mod:`..layer.error_budget`); read if ``allowed``
            is None.
        allowed: the largest ‖y - exact‖ / ‖exact‖, of operands that are not ours.
    """
    if not bool(torch.isfinite(y).all()):
        return Check(False, float("nan"), "finite outputs everywhere")
    part = y[picked]
    error = _norm_error(part, exact)
    if allowed is not None:
        return Check(error <= allowed, error, f"{allowed} relative")
    share = worst_share(part, exact, budget)
    return Check(share <= 1, error, f"by the error budget, of which it uses {share:.2g}")


def check_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    exact: torch.Tensor,
    error: torch.Tensor,
    amax: torch.Tensor | None = None,
) -> Check:
    """Compare int8 ``codes`` [M, K] and ``scales`` [M] with what ``exact``, fp64 [M, K], has to be quantized to;
    ``error``, fp64 [M], is what fp32 may have put it off by before.
    """
    share = worst_share_of_codes(codes, scales, exact, error, reference.SMALLEST_AMAX, amax)
    return Check(share <= 1, share, "1: half a step, and what fp32 is off by before")
