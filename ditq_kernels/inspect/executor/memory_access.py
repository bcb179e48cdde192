"""Loads and stores."""

from __future__ import annotations

import numpy as np

from .faults import UNSIGNED, WARP
from .operands import DTYPE, access, address_of, destination, opcode, source, vector_of
from .syntax import WIDTH, Symbol

SPACES = ("global", "shared", "local", "param")


def unravel(m, found, mask, lanes, count, kind, keeps):
    """Gives ``found``, one row of ``count`` elements a lane of ``lanes``, to registers."""
    pieces = found.view(DTYPE[kind]).reshape(-1, count)
    for i, keep in enumerate(keeps):
        values = np.ascontiguousarray(pieces[:, i])
        if lanes is not None:
            spread = np.zeros(m.lanes, values.dtype)
            spread[lanes] = values
            values = spread
        keep(m, values, mask)


def _space(instruction):
    """The state space that the opcode names; None if it is generic."""
    for part in instruction.parts[1:]:
        if part.partition("::")[0] in SPACES:
            return part.partition("::")[0]
    return None


def _read(m, space, at, width, lanes):
    if space == "global":
        m.count_global("load", at, width, lanes)
        return m.memory.load(at, width)
    if space == "shared":
        m.count_shared("load", at, width, lanes)
        return m.shared.load(at, width, lanes)
    offsets = m.local_index(at, width)
    return np.ascontiguousarray(m.local[lanes[:, None], offsets[:, None] + np.arange(width)]).view(UNSIGNED[width])[
        :, 0
    ]


def _write(m, space, at, width, values, lanes):
    if space == "global":
        m.count_global("store", at, width, lanes)
        m.memory.store(at, width, values)
    elif space == "shared":
        m.count_shared("store", at, width, lanes)
        m.shared.store(at, width, values, lanes)
    else:
        offsets = m.local_index(at, width)
        m.local[lanes[:, None], offsets[:, None] + np.arange(width)] = values.view(np.uint8).reshape(-1, width)


def _addresses(operand, space, kernel):
    held = 8 if isinstance(operand.base, Symbol) else kernel.widths[getattr(operand.base, "index", 0)]
    return address_of(operand, "u64" if space in ("global", None) or held == 8 else "u32", kernel)


@opcode("ld", "ldu")
def load(instruction, kernel):
    space = _space(instruction)
    kind, count = access(instruction)
    keeps = [destination(o, kernel) for o in vector_of(instruction.operands[0])]
    where = instruction.operands[1]
    width = WIDTH[kind] * count
    if space == "param":
        name, offset = where.base.name, where.offset

        def from_parameter(m, mask):
            unravel(m, m.parameters[name].view(np.uint8)[offset : offset + width], mask, None, count, kind, keeps)

        return from_parameter
    addresses = _addresses(where, space, kernel)

    def run(m, mask):
        at = addresses(m)
        if space == "global" and at.size == 1:  # all lanes alike
            if mask is None or mask.any():
                if m.counters:
                    first = m.rows(mask) * WARP
                    m.count_global("load", np.repeat(at, len(first)), width, first)
                unravel(m, m.memory.load(at, width), mask, None, count, kind, keeps)
            return
        lanes = m.chosen(mask)
        if lanes.size:
            at = m.spread(at)[lanes]
            found = _read(m, space or m.space_of(at), at, width, lanes)
            unravel(m, found, mask, None if mask is None else lanes, count, kind, keeps)

    return run


@opcode("st")
def store(instruction, kernel):
    space = _space(instruction)
    kind, count = access(instruction)
    where, what = instruction.operands[:2]
    reads = [source(o, kind, kernel) for o in vector_of(what)]
    width = WIDTH[kind] * count
    addresses = _addresses(where, space, kernel)

    def run(m, mask):
        lanes = m.chosen(mask)
        if lanes.size:
            values = np.stack([m.spread(read(m))[lanes] for read in reads], 1).reshape(-1).view(UNSIGNED[width])
            at = m.spread(addresses(m))[lanes]
            _write(m, space or m.space_of(at), at, width, values, lanes)

    return run
