"""Global memory: the tensors that a kernel was given, with bounds, and nothing else."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from .counters import SECTOR
from .faults import UNSIGNED, Fault

_FAR = 1 << 40  # bytes between the addresses of two regions
_NUMBERS = itertools.count(256)  # behind PARAMETER_BASE


class Region:
    """The bytes of one tensor, gaps between its elements excluded, and which of them were written.

    Attributes:
        first: the address that kernels know the tensor by: far from every other's, so that who misses one does not hit
            another, and aligned as the tensor is.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        item = tensor.element_size()
        self.name, self.tensor = name, tensor
        held = tensor.data_ptr()
        self.first = next(_NUMBERS) * _FAR + held % 4096
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.size = reach * item if tensor.numel() else 0
        self.filled = tensor.numel() * item  # bytes of elements
        self.end = self.first + self.size
        self.start = self.first & ~15
        padded = -(-(self.end - self.start) // 16) * 16
        raw = np.frombuffer((ctypes.c_uint8 * padded).from_address(held & ~15), np.uint8) if padded else np.zeros(0)
        self.views = {width: raw.view(UNSIGNED[width]) for width in (1, 2, 4, 8, 16)} if padded else {}
        self.elements = None if reach == tensor.numel() else self._elements(reach, item)
        self.counted = None if self.elements is None else self._counted()  # bytes of elements before each byte
        self.written: np.ndarray | None = None  # of each byte from ``start`` on; None before the first store
        self.read = False

    def _elements(self, reach, item):
        """Which bytes belong to elements."""
        held = np.zeros(reach, np.bool_)
        np.lib.stride_tricks.as_strided(held, tuple(self.tensor.shape), self.tensor.stride())[...] = True
        return np.repeat(held, item)

    def _counted(self):
        """As small as it can be: as many numbers as the tensor has bytes."""
        counted = np.zeros(len(self.elements) + 1, np.int32 if len(self.elements) < 2**31 else np.int64)
        np.cumsum(self.elements, out=counted[1:])
        return counted

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which accesses touch elements and nothing else."""
        inside = (addresses >= self.first) & (addresses + np.uint64(width) <= self.end)
        if self.counted is not None and inside.any():
            offsets = np.where(inside, addresses - np.uint64(self.first), 0).astype(np.int64)
            inside &= self.counted[np.where(inside, offsets + width, 0)] - self.counted[offsets] == width
        return inside

    def store(self, at: np.ndarray, width: int, values: np.ndarray) -> None:
        """``values`` to elements ``at`` of the view of ``width``; what is there already must be the same."""
        if self.written is None:
            self.written = np.zeros(len(self.views[1]), np.bool_)
        view, bytes_ = self.views[width], (at[:, None] * width + np.arange(width)).ravel()
        again = self.written[bytes_].reshape(-1, width).any(1)
        if again.any() and (view[at[again]] != values[again]).any():
            raise Fault(f"{self.name} is written twice at one place, with different values")
        view[at] = values
        if (view[at] != values).any():
            raise Fault(f"lanes store different values to one place of {self.name}")
        self.written[bytes_] = True

    @property
    def bytes(self) -> np.ndarray:
        """All from the first to the last, gaps included."""
        return self.views[1][self.first - self.start : self.end - self.start] if self.views else np.zeros(0, np.uint8)

    def saved(self) -> bytes:
        """What :attr:`bytes` holds."""
        return self.bytes.tobytes()

    def restore(self, saved: bytes) -> None:
        """The inverse of :meth:`saved`, for the bytes of elements."""
        here = self.bytes
        values = np.frombuffer(saved, np.uint8)
        here[:] = values if self.elements is None else np.where(self.elements, values, here)

    def unwritten(self) -> int:
        """How many bytes of elements no store has reached."""
        if self.written is None:
            return self.filled
        missing = ~self.written[self.first - self.start : self.end - self.start]
        return int((missing if self.elements is None else missing & self.elements).sum())


class GlobalMemory:
    """The regions of one launch. Tensors that share memory may only be read."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = [region for region in regions if region.size]

    def check_aliases(self) -> None:
        """Fault if what was written by one name is part of a tensor of another."""
        for region, other in itertools.permutations(self.regions, 2):
            if region.written is None or not np.shares_memory(region.bytes, other.bytes):
                continue
            raise Fault(f"writes {region.name}, which shares memory with {other.name}")

    def _places(self, addresses, width):
        """(which of ``addresses``, their region) for each region that holds some."""
        if width > 1 and (addresses & np.uint64(width - 1)).any():
            raise Fault(f"misaligned: {width} bytes at {int(addresses[(addresses & np.uint64(width - 1)) != 0][0]):#x}")
        for region in self.regions:
            if region.holds(addresses, width).all():
                return [(slice(None), region)]
        places, left = [], np.ones(len(addresses), np.bool_)
        for region in self.regions:
            inside = region.holds(addresses, width) & left
            if inside.any():
                places.append((inside, region))
                left &= ~inside
        if left.any():
            raise Fault(f"out of bounds: {width} bytes at {self._describe(int(addresses[left][0]))}")
        return places

    def places_in_sectors(
        self, addresses: np.ndarray, width: int
    ) -> Iterator[tuple[str, slice | np.ndarray, np.ndarray]]:
        """(tensor, which of ``addresses`` it holds, their offsets from the beginning of its first sector)."""
        for which, region in self._places(addresses, width):
            yield region.name, which, (addresses[which] - np.uint64(region.first // SECTOR * SECTOR)).astype(np.int64)

    def _describe(self, address):
        if not self.regions:
            return f"{address:#x}, and there are no tensors"
        near = min(self.regions, key=lambda r: max(r.first - address, address - r.end + 1))
        gaps = ", gaps between its rows included" if near.counted is not None else ""
        return f"byte {address - near.first} of {near.name}, which has {near.size}{gaps}"

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """``width`` bytes at each of ``addresses``."""
        found = np.empty(len(addresses), UNSIGNED[width])
        for which, region in self._places(addresses, width):
            if region.written is not None:
                raise Fault(f"reads {region.name}, which the same launch writes")
            region.read = True
            at = (addresses[which] - np.uint64(region.start)).astype(np.int64) // width
            found[which] = region.views[width][at]
        return found

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        """The inverse of :meth:`load`."""
        for which, region in self._places(addresses, width):
            if region.read:
                raise Fault(f"writes {region.name}, which the same launch reads")
            region.store((addresses[which] - np.uint64(region.start)).astype(np.int64) // width, width, values[which])
