"""Rounding whose errors are made up for by the columns that are rounded later: one shot, in closed form.

The optimal brain surgeon's step (Hassibi and Stork, 1993) for a layer's squared output error, in the order of GPTQ
(Frantar et al., arXiv 2210.17323): columns in descending order of their input's energy, the grid fitted beforehand. It
is computed as LDLQ, which is the same (Chee et al., arXiv 2307.13304, theorem 6): what is rounded is the weight and the
errors so far times a triangular factor of the moment, and nothing is inverted.
"""

from __future__ import annotations

import torch

from ..progress import track
from . import cpu_extension
from .grid import Grid, positive

DAMPING = 0.01  # added to the moment's diagonal, as a fraction of its mean (Frantar et al., arXiv 2210.17323)
BLOCK = 128  # columns whose error is spread at once over all later ones


def compensation_bytes(in_features: int) -> int:
    """The most memory that error-compensated rounding takes for a layer of K inputs, beside a few copies of its weight:
    the moment's factor in fp64, and in fp32.
    """
    return 12 * in_features**2


def compensated_codes(w: torch.Tensor, grid: Grid, moment: torch.Tensor) -> torch.Tensor:
    """Codes, as fp32 [N, K], of fp32 ``w`` [N, K], for the inputs whose ``moment`` [K, K] is given: rounded column by
    column, each column's error carried over to the columns not yet rounded.

    Raises:
        ValueError: if the moment is no sum of outer products.
    """
    with torch.autocast(w.device.type, enabled=False):  # which would have products of columns in 16 bits
        return _compensated_codes(w, grid, moment.to(w.device))


def _compensated_codes(w: torch.Tensor, grid: Grid, moment: torch.Tensor) -> torch.Tensor:
    diagonal = moment.diagonal().to(torch.float64)
    unseen = diagonal <= 0
    diagonal = torch.where(unseen, diagonal[~unseen].mean() if bool((~unseen).any()) else 1.0, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True)
    taken = _taken(moment, diagonal, order)
    # Transposed: a column and its errors lie side by side in memory.
    exact = w.T.contiguous().index_select(0, order)
    step, zero = positive(grid.step).T.contiguous(), grid.zero.T.contiguous()
    groups = order // grid.group
    errors, codes = torch.empty_like(exact), torch.empty_like(exact)
    round_block = cpu_extension.compensate if cpu_extension.rounds(exact) else _round_block
    starts = range(0, len(order), BLOCK)
    for start in track(starts, len(starts), "block", delay=2):
        block = slice(start, min(start + BLOCK, len(order)))
        wanted = torch.addmm(exact[block], taken[block, :start], errors[:start]) if start else exact[block].clone()
        of_columns = (part.index_select(0, groups[block]) for part in (step, zero))
        within = taken[block, block].contiguous()
        round_block(exact[block], wanted, within, *of_columns, (grid.low, grid.high), errors[block], codes[block])
    return torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()


def _round_block(
    exact: torch.Tensor,
    wanted: torch.Tensor,
    within: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    limits: tuple[int, int],
    errors: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Fills ``errors`` and ``codes`` of some columns, one after the other.

    Args:
        exact, wanted: fp32 [columns, N], the weight and what it would be with all earlier blocks' errors made up for;
            ``wanted`` is overwritten.
        within: fp32 [columns, columns]: below the diagonal what each column takes of each earlier one's error.
        step, zero: fp32 [columns, N].
        limits: of codes.
    """
    parts = zip(*(part.unbind() for part in (exact, wanted, step, zero, errors, codes)), strict=True)
    for k, (exact_k, target, step_k, zero_k, error, code) in enumerate(parts):
        if k:
            target.addmv_(errors[:k].T, within[k, :k])
        torch.div(target, step_k, out=code).round_().add_(zero_k).clamp_(*limits)
        torch.addcmul(exact_k, code - zero_k, step_k, value=-1, out=error)


def _taken(moment: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """fp32 [K, K], lower triangular with ones on its diagonal: in each row what a column takes of the errors of those
    before it. Its transpose is ``M`` of ``M D M^T``, D diagonal, which is the moment in ``order`` and damped.
    ``diagonal`` stands in for its own. The damping grows tenfold until it can be factored.
    """
    damping = DAMPING * diagonal.mean()
    backwards = order.flip(0)  # the lower factor from the end is the upper one from the beginning
    size = len(order)
    damped = torch.empty(size, size, dtype=torch.float64, device=moment.device)
    failed = torch.empty((), dtype=torch.int32, device=moment.device)
    # Some rows at a time, and in place, which LAPACK does in columns: what would be copied on the way costs as much as
    # a third of the factorization.
    stretches = [slice(start, min(start + 2 * BLOCK, size)) for start in range(0, size, 2 * BLOCK)]
    for _ in range(8):
        for rows in stretches:
            damped[rows] = moment.index_select(0, backwards[rows]).index_select(1, backwards)
        damped.diagonal().copy_(diagonal[backwards] + damping)
        torch.linalg.cholesky_ex(damped.mT, out=(damped.mT, failed))
        if not failed:
            taken = torch.empty(size, size, dtype=torch.float32, device=moment.device)
            pivots = damped.diagonal().clone().unsqueeze(1)
            for rows in stretches:
                taken[size - rows.stop : size - rows.start] = (damped[rows] / pivots[rows]).flip(0, 1)
            return taken
        damping = damping * 10
    raise ValueError(
        "input_moment cannot be factored even with heavy damping; it must be a sum of outer products x x^T"
    )
