"""What a kernel does: bytes that it reads and writes, and multiply-accumulates; and how long that takes at least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..bounds import Gpu
from ..machine_code import MACS_PER_CLOCK

PASS, PRODUCT, ATTENTION = "pass", "product", "attention"
WEIGHT, SCRATCH, ACTIVATION = "weight", "scratch", "activation"
INT8, WIDE = "int8", "16 bits"  # operands that are multiplied


@dataclass(frozen=True)
class Work:
    """Of one kernel.

    Attributes:
        name: of the operation, or of what the compiler made of several.
        kind: PASS, PRODUCT or ATTENTION.
        touched: (role, bytes) of each tensor that is read, and once more if it is written; roles are WEIGHT, SCRATCH
            (a weight decoded for one product) and ACTIVATION.
        macs: multiply-accumulates, by what is multiplied: INT8 or WIDE.
    """

    name: str
    kind: str
    touched: tuple[tuple[str, int], ...]
    macs: dict[str, int] = field(default_factory=dict)

    def moved(self, *roles: str) -> int:
        """Bytes of tensors in ``roles``."""
        return sum(size for role, size in self.touched if role in roles)

    def bound(self, arch: int, gpu: Gpu) -> float:
        """Microseconds that it takes at least, by published rates: its matrix units', L2's of all that is touched, and
        memory's of weights (which are more than L2 holds, over a model) and of what of a tensor L2 cannot hold.
        """
        clocks_a_us = gpu.clock_ghz * 1e3
        rates = {INT8: MACS_PER_CLOCK[arch][0], WIDE: gpu.wide_macs}
        matrix = sum(number / rates[kind] for kind, number in self.macs.items()) / gpu.multiprocessors
        through_l2 = self.moved(WEIGHT, SCRATCH, ACTIVATION) / gpu.l2_bytes
        beyond = sum(max(0, size - gpu.l2_size) for role, size in self.touched if role != WEIGHT)
        memory = (self.moved(WEIGHT) + beyond) / gpu.memory_gbs / 1e3
        return max(matrix / clocks_a_us, through_l2 / clocks_a_us, memory)


@dataclass(frozen=True)
class Total:
    """Of several kernels.

    Attributes:
        launches: how many there are.
        passed, activations: bytes of activations that are moved outside products and attention, and in all.
        weights: bytes of weights, decoded ones included.
        macs: multiply-accumulates.
        bound: microseconds, the sum of the kernels'.
    """

    launches: int
    passed: int
    activations: int
    weights: int
    macs: int
    bound: float

    @classmethod
    def of(cls, kernels: Iterable[Work], arch: int, gpu: Gpu) -> Total:
        kernels = list(kernels)
        return cls(
            len(kernels),
            sum(one.moved(ACTIVATION) for one in kernels if one.kind == PASS),
            sum(one.moved(ACTIVATION) for one in kernels),
            sum(one.moved(WEIGHT, SCRATCH) for one in kernels),
            sum(sum(one.macs.values()) for one in kernels),
            sum(one.bound(arch, gpu) for one in kernels),
        )

    def times(self, number: int) -> Total:
        """Of ``number`` such."""
        return Total(*(number * value for value in vars(self).values()))

    def plus(self, other: Total) -> Total:
        """Of both."""
        return Total(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))
