"""A progress bar around a loop, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

Step = TypeVar("Step")


def track(steps: Iterable[Step], total: int, unit: str, delay: float = 0) -> Iterable[Step]:
    """``steps`` behind a bar of ``total`` ``unit``s, which shows after ``delay`` seconds. Without tqdm there is no bar:
    measuring and inspecting kernels needs PyTorch and Triton alone.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, unit=unit, file=sys.stderr, mininterval=1.0, leave=False, delay=delay)
