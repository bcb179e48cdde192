"""Progress bars on standard error: around a loop, and for what calls when it has got on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
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


@contextlib.contextmanager
def advancing(total: int, unit: str) -> Iterator[Callable[[], object]]:
    """What to call for each of ``total`` ``unit``s that is done, while a bar shows it; as :func:`track`, without tqdm
    there is none.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit=unit, file=sys.stderr, mininterval=1.0, leave=False) as bar:
        yield bar.update
