"""Kernels that are started while the one before them in the stream ends: programmatic dependent launch, from Hopper on.
What goes before their first access to memory is then hidden behind it.

For kernels of a program a row. Decoding a weight into a scratch was slower by it on an H200: its programs, many of
which fit a multiprocessor, crowd on those that are free first.
"""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .interpreter import interpreting

FIRST_CAPABILITY = 90


@triton.jit
def wait_for_earlier_kernels():
    """Before the first access to memory. The next kernel may be started when all programs have come here; it waits in
    its turn, if it is one that starts early.
    """
    gdc_wait()
    gdc_launch_dependents()


def starts_early(capability: int) -> bool:
    """Whether kernels do on devices of ``capability``, 10 * major + minor."""
    return capability >= FIRST_CAPABILITY and not interpreting()


def launch_options(early: bool) -> dict[str, bool]:
    """Triton's."""
    return dict(launch_pdl=True) if early else {}
