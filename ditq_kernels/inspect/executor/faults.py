"""What ends an execution before its time, and addresses and poison that all parts of the machine agree on."""

from __future__ import annotations

import numpy as np

UNSIGNED = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}
POISON = 0xCBCBCBCBCBCBCBCB  # registers that nothing was written to
SHARED_POISON = 0xFF  # NaN in 16 and 32 bits, -1 as an integer
SHARED_BASE = 1024  # the address at which shared memory begins
LOCAL_BASE = 1 << 20  # the address at which each thread's own memory begins
PEER = (
    1 << 24
)  # a place of shared memory in the block of rank r of the cluster: its address in one's own, + (r + 1) PEER
MOST_PEERS = 16  # blocks of a cluster
PARAMETER_BASE = 0x7A00_0000_0000  # addresses of kernel parameters, this and 256 more for each
WARP = 32
WARPGROUP = 4  # warps


class Fault(Exception):
    """What a GPU would fault on, or should not be asked to do."""


class Unsupported(Exception):
    """An instruction that is not implemented."""
