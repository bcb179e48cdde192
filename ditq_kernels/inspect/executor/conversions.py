"""Moves, and conversions between types."""

from __future__ import annotations

import numpy as np

from .faults import UNSIGNED
from .floats import from_bf16, to_bf16
from .operands import DTYPE, destination, elementwise, opcode, source
from .syntax import WIDTH, Vector


@opcode("mov", "cvta")
def move(instruction, kernel):
    kind = instruction.parts[-1]
    into, what = instruction.operands
    if isinstance(into, Vector):
        part = WIDTH[kind] // len(into.parts)
        keeps, read = [destination(o, kernel) for o in into.parts], source(what, kind, kernel)

        def split(m, mask):
            pieces = read(m).view(UNSIGNED[part]).reshape(-1, len(keeps))
            for i, keep in enumerate(keeps):
                keep(m, np.ascontiguousarray(pieces[:, i]), mask)

        return split
    keep = destination(into, kernel)
    if isinstance(what, Vector):
        part = WIDTH[kind] // len(what.parts)
        reads = [source(o, f"b{8 * part}", kernel) for o in what.parts]

        def join(m, mask):
            pieces = np.broadcast_arrays(*[read(m) for read in reads])
            keep(m, np.stack(pieces, 1).reshape(-1).view(DTYPE[kind]), mask)

        return join
    read = source(what, kind, kernel)
    return lambda m, mask: keep(m, read(m), mask)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(kind, rounding):
    """Of fp32, kept within the range, NaN as 0."""
    info = np.iinfo(DTYPE[kind])
    function = ROUND[rounding]

    def convert(x):
        y = function(x.astype(np.float64))
        y = np.clip(np.where(np.isnan(y), 0, y), info.min, info.max)
        limit = float(info.max)
        return np.where(y >= limit, info.max, np.where(y >= limit, 0, y).astype(np.int64)).astype(DTYPE[kind])

    return convert


@opcode("cvt")
def convert(instruction, kernel):
    *modes, to, of = instruction.parts[1:]
    if modes == ["sat"] and to == "f32":
        return elementwise(instruction, kernel, ["f32"], lambda x: np.fmax(np.fmin(x, np.float32(1)), np.float32(0)))
    if to in ("bf16x2", "f16x2"):
        narrow = to_bf16 if to == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))

        def both(high, low):
            high, low = np.broadcast_arrays(narrow(high), narrow(low))
            return np.stack((low, high), 1).reshape(-1).view(np.uint32)

        return elementwise(instruction, kernel, [of, of], both)
    if to == "bf16" and of == "f32":
        return elementwise(instruction, kernel, [of], to_bf16)
    if of == "bf16" and to == "f32":
        return elementwise(instruction, kernel, [of], from_bf16)
    if "f" in of and "f" not in to:
        return elementwise(instruction, kernel, [of], to_integer(to, modes[0]))
    if "sat" in modes:
        info, dtype = np.iinfo(DTYPE[to]), DTYPE[to]
        return elementwise(instruction, kernel, [of], lambda x: np.clip(x, info.min, info.max).astype(dtype))
    dtype = DTYPE[to]
    return elementwise(instruction, kernel, [of], lambda x: x.astype(dtype))
