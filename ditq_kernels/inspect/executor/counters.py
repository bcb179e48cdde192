"""What a profiler would count of the memories while a kernel runs.

A warp's load or store of global memory is one request, and moves whole sectors of 32 bytes. Of shared memory it takes
as many passes as the fullest of 32 banks has words of 4 bytes for it: by 32 lanes at a time; by 16 where each takes 8
bytes, by 8 where each takes 16 (CUDA C++ Programming Guide, "Global Memory" and "Shared Memory" in its chapter on
compute capabilities; how wide accesses are split is not in it, and was found by others with a profiler).
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import numpy as np

from .faults import WARP

SECTOR, WORD, BANKS = 32, 4, 32


@dataclass
class Requests:
    """To global memory, of one kind and for one tensor.

    Attributes:
        requests: of warps.
        sectors: that they touch, each request by itself.
        least: sectors that the bytes they ask for would fill, each byte of a request counted once.
    """

    requests: int = 0
    sectors: int = 0
    least: int = 0


@dataclass
class Passes:
    """Of shared memory, of one kind.

    Attributes:
        passes: that requests of warps take.
        least: that they would take if no two words of a pass shared a bank.
    """

    passes: int = 0
    least: int = 0


def _distinct(groups: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a group and a place, each once."""
    first = int(places.min())
    reach = int(places.max()) - first + 1
    keys = np.unique(groups.astype(np.int64) * reach + (places - first))
    return keys // reach, keys % reach + first


def sectors(rows: np.ndarray, offsets: np.ndarray, width: int) -> tuple[int, int]:
    """(sectors, the least that would hold the bytes) of requests of ``width`` bytes at ``offsets`` into a tensor that
    begins with a sector; ``rows`` are the warps.
    """
    touched, _ = _distinct(rows, offsets // SECTOR)
    asked, _ = _distinct(rows, offsets // width)
    bytes_ = np.bincount(np.unique(asked, return_inverse=True)[1]) * width
    return len(touched), int((-(-bytes_ // SECTOR)).sum())


def bank_passes(groups: np.ndarray, offsets: np.ndarray, width: int) -> tuple[int, int]:
    """(passes, the least number of them) of accesses of ``width`` bytes at byte ``offsets`` into shared memory, where
    those of one group are made at once.
    """
    words = (offsets // WORD)[:, None] + np.arange(max(1, width // WORD))
    groups_of, words = _distinct(np.repeat(groups, words.shape[1]), words.ravel())
    full = np.bincount(np.unique(groups_of, return_inverse=True)[1] * BANKS + words % BANKS)
    full = np.pad(full, (0, -len(full) % BANKS)).reshape(-1, BANKS)
    return int(full.max(1).sum()), int((-(-full.sum(1) // BANKS)).sum())


def at_once(rows: np.ndarray, lanes: np.ndarray, width: int) -> np.ndarray:
    """Numbers of the groups of lanes whose accesses of ``width`` bytes are made at once; ``rows`` are their warps."""
    part = WARP * WORD // max(WORD, width)
    return rows * (WARP // part) + lanes % WARP // part


@dataclass
class Counters:
    """Of some blocks of a launch.

    Attributes:
        blocks: thread blocks that were executed.
        tensors: the launch's, and the bytes of their elements.
        requests: by (kind, tensor); "load", "store" and "copy", which is cp.async.
        fetched: bytes by tensor that come from L2 or go there, if the first cache keeps what a block has loaded: whole
            sectors. Copies pass it by; loads are all taken to be kept.
        passes: by kind; "load", "store", "copy", and "matrix load" and "matrix store" of 8 rows of 16 bytes at once.
            Engines' reads and writes (wgmma, tensor copies) are not among them: their swizzling keeps banks apart.
        engines: bytes of shared memory that these read and write.
        macs: multiply-accumulates of matrix instructions, by the type of their operands as PTX calls it.
        issued: PTX instructions that warps issued, by the first part of their names; mbarrier.try_wait twice a phase,
            since each is refused once here.
        waits: (of what, how many groups may be left in flight): times that a warp waited so.
        entered: basic blocks of the program, by their numbers: times that a warp ran through them.
    """

    blocks: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    requests: dict[tuple[str, str], Requests] = field(default_factory=lambda: collections.defaultdict(Requests))
    fetched: collections.Counter = field(default_factory=collections.Counter)
    passes: dict[str, Passes] = field(default_factory=lambda: collections.defaultdict(Passes))
    engines: int = 0
    macs: collections.Counter = field(default_factory=collections.Counter)
    issued: collections.Counter = field(default_factory=collections.Counter)
    waits: collections.Counter = field(default_factory=collections.Counter)
    entered: collections.Counter = field(default_factory=collections.Counter)
    _loaded: dict[str, np.ndarray] = field(default_factory=dict)  # sectors, by block, of the blocks that run

    def request(self, kind: str, tensor: str, rows: np.ndarray, warps: int, offsets: np.ndarray, width: int) -> None:
        """Accesses of ``width`` bytes by the warps ``rows``, of which a block has ``warps``, at ``offsets`` into the
        tensor, which begin with its first sector.
        """
        touched, least = sectors(rows, offsets, width)
        known = self.requests[kind, tensor]
        known.requests += len(np.unique(rows))
        known.sectors += touched
        known.least += least
        if kind == "load":
            blocks = rows // warps
            places = offsets // SECTOR
            loaded = self._loaded.get(tensor, np.zeros((0, 0), np.bool_))
            shape = max(len(loaded), int(blocks.max()) + 1), max(loaded.shape[1], int(places.max()) + 1)
            if shape != loaded.shape:
                grown = max(shape[1], 2 * loaded.shape[1]) if shape[1] > loaded.shape[1] else shape[1]
                loaded = np.pad(loaded, ((0, shape[0] - len(loaded)), (0, grown - loaded.shape[1])))
                self._loaded[tensor] = loaded
            loaded[blocks, places] = True
        else:
            self.fetched[tensor] += SECTOR * touched

    def end_blocks(self) -> None:
        """The blocks that run are done."""
        for tensor, loaded in self._loaded.items():
            self.fetched[tensor] += SECTOR * int(loaded.sum())
        self._loaded = {}

    def shared(self, kind: str, groups: np.ndarray, offsets: np.ndarray, width: int) -> None:
        """See :func:`bank_passes`."""
        taken, least = bank_passes(groups, offsets, width)
        self.passes[kind].passes += taken
        self.passes[kind].least += least
