"""One case: a computation by compiled kernels, and its verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...layer import error_budget

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.int32: "i32"}


class Mismatch(Exception):
    """The result is not what it must be."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    family: the kernel or route.
    name: what is computed, with the form of the kernel; unique within an architecture.
    compute: runs it and says in a few words how well it agrees; raises :class:`Mismatch`.
    quick: whether it belongs to the choice that runs in a few minutes.
    """

    family: str
    name: str
    compute: Callable[[], str]
    quick: bool = False


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> str:
    """Bit for bit, NaN included; in words."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Mismatch(f"{what}: {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}")
    same = actual.eq(expected)
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        error = (actual.double() - expected.double()).abs()
        at = tuple(int(i) for i in torch.nonzero(~same)[0])
        raise Mismatch(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {at}, by up to {error.max():.3g}"
        )
    return f"{what} equal"


def within_budget(actual: torch.Tensor, oracle: tuple[torch.Tensor, torch.Tensor], what: str) -> str:
    """No further from the exact result than the budget allows, as :mod:`~ditq_kernels.layer.error_budget` gives the
    two; in words.
    """
    share = error_budget.worst_share(actual, *oracle)
    if not share <= 1:
        raise Mismatch(f"{what}: {share:.3g} times the error that is allowed")
    return f"{what} {share:.2f} of the budget"


def case_of(family: str, name: str, function: Callable[..., str], *arguments, quick: bool = False) -> Case:
    """The case that ``function`` computes of ``arguments``."""
    return Case(family, f"{family} {name}", functools.partial(function, *arguments), quick)
