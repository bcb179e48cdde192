"""Loads and stores."""

from __future__ import annotations

import numpy as np

from .faults import MOST_PEERS, PEER, UNSIGNED, WARP
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


def _reaches_peers(instruction):
    """Whether its addresses may be of another block of the cluster."""
    return "shared::cluster" in instruction.parts or _space(instruction) is None


def _read(m, space, at, width, lanes, peers):
    if space == "global":
        m.count_global("load", at, width, lanes)
        return m.memory.load(at, width)
    if space == "shared":
        m.count_shared("load", at, width, lanes)
        return m.shared.load(at, width, lanes, peers)
    offsets = m.local_index(at, width)
    return np.ascontiguousarray(m.local[lanes[:, None], offsets[:, None] + np.arange(width)]).view(UNSIGNED[width])[
        :, 0
    ]


def _write(m, space, at, width, values, lanes, peers):
    if space == "global":
        m.count_global("store", at, width, lanes)
        m.memory.store(at, width, values)
    elif space == "shared":
        m.count_shared("store", at, width, lanes)
        m.shared.store(at, width, values, lanes, peers)
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
    addresses, peers = _addresses(where, space, kernel), _reaches_peers(instruction)

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
            found = _read(m, space or m.space_of(at), at, width, lanes, peers)
            unravel(m, found, mask, None if mask is None else lanes, count, kind, keeps)

    return run


@opcode("st")
def store(instruction, kernel):
    space = _space(instruction)
    kind, count = access(instruction)
    where, what = instruction.operands[:2]
    reads = [source(o, kind, kernel) for o in vector_of(what)]
    width = WIDTH[kind] * count
    addresses, peers = _addresses(where, space, kernel), _reaches_peers(instruction)

    def run(m, mask):
        lanes = m.chosen(mask)
        if lanes.size:
            values = np.stack([m.spread(read(m))[lanes] for read in reads], 1).reshape(-1).view(UNSIGNED[width])
            at = m.spread(addresses(m))[lanes]
            _write(m, space or m.space_of(at), at, width, values, lanes, peers)

    return run


@opcode("mapa")
def address_in_peer(instruction, kernel):
    """The address of the same place in another block of the cluster."""
    into, of, rank = instruction.operands
    kind = instruction.parts[-1]
    keep, read, rank = destination(into, kernel), source(of, kind, kernel), source(rank, "u32", kernel)

    def run(m, mask):
        # Of a block that there is not, it is an address that nobody can use: compilers ask early, and for lanes that
        # do without.
        ranks = np.minimum(rank(m), MOST_PEERS).astype(DTYPE[kind])
        keep(m, read(m) % PEER + (ranks + 1) * PEER, mask)

    return run


@opcode("createpolicy")
def cache_policy(instruction, kernel):
    """How long caches are to keep something changes no value."""
    keep = destination(instruction.operands[0], kernel)
    return lambda m, mask: keep(m, np.zeros(1, np.uint64), mask)
