"""Whether kernels run in Triton's interpreter: fixed when the first kernel is defined, so it is read then and not
later.
"""

from __future__ import annotations

import triton

_INTERPRETING: bool = triton.knobs.runtime.interpret


def interpreting() -> bool:
    """True if the kernels of this process were defined for the interpreter (``TRITON_INTERPRET=1``)."""
    return _INTERPRETING
