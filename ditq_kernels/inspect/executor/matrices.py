"""Matrix instructions of a warp, and how their fragments lie in registers."""

from __future__ import annotations

import numpy as np

from .faults import WARP, Fault, Unsupported
from .floats import from_bf16
from .memory_access import unravel
from .operands import DTYPE, address_of, destination, opcode, source, vector_of
from .syntax import WIDTH
from .tensor_core import multiply_accumulate

# A fragment is [warps, lanes * registers * elements]; tables say which of them each element of a tile is.
_LANE = np.arange(WARP)
_GROUP, _PLACE = _LANE // 4, _LANE % 4


def _table(rows, columns, shape):
    """Where each element of a tile lies in the fragment, from each fragment element's row and column."""
    rows, columns = np.broadcast_arrays(rows, columns)
    table = np.empty(shape, np.int64)
    table[rows.ravel(), columns.ravel()] = np.arange(rows.size)
    return table


def left_table(item):
    """[16, 32 / item] of four registers."""
    per = 4 // item
    register, element = np.arange(4)[None, :, None], np.arange(per)[None, None, :]
    rows = _GROUP[:, None, None] + 8 * (register % 2) + 0 * element
    columns = per * _PLACE[:, None, None] + element + 4 * per * (register // 2)
    return _table(rows, columns, (16, 32 // item))


def right_table(item):
    """[8, 32 / item], outputs by inputs, of two registers."""
    per = 4 // item
    register, element = np.arange(2)[None, :, None], np.arange(per)[None, None, :]
    columns = per * _PLACE[:, None, None] + element + 4 * per * register
    return _table(_GROUP[:, None, None] + 0 * columns, columns, (8, 32 // item))


def sum_table(columns):
    """[16, columns] of columns / 2 registers."""
    register = np.arange(columns // 2)[None, :]
    rows = _GROUP[:, None] + 8 * (register // 2 % 2)
    return _table(rows, 8 * (register // 4) + 2 * _PLACE[:, None] + register % 2, (16, columns))


def tile(m, reads, kind, table):
    """[warps, rows, columns] that registers hold, in their own type."""
    registers = np.stack([m.spread(read(m)) for read in reads], 1)
    return registers.view(DTYPE[kind]).reshape(m.warps, -1)[:, table]


def fragment(m, values, table):
    """The inverse for 32-bit values: one array a register."""
    flat = np.empty((m.warps, table.size), values.dtype)
    flat[:, table.ravel()] = values.reshape(m.warps, -1)
    return np.ascontiguousarray(flat.reshape(m.warps * WARP, -1).T)


def as_fp32(values, kind):
    return from_bf16(values) if kind == "bf16" else values.astype(np.float32)


@opcode("mma")
def matrix_multiply(instruction, kernel):
    parts = instruction.parts
    into, of, left, _ = parts[-4:]
    item = WIDTH[of]
    if f"m16n8k{32 // item}" not in parts or left != of:
        raise Unsupported(instruction.text)
    saturate = "satfinite" in parts
    keeps = [destination(o, kernel) for o in instruction.operands[0].parts]
    a, b, c = ([source(o, "b32", kernel) for o in operand.parts] for operand in instruction.operands[1:])
    tables = left_table(item), right_table(item), sum_table(8)

    def run(m, mask):
        m.whole_warps(mask)
        if m.counters:
            m.counters.macs[of] += 16 * 8 * (32 // item) * len(m.rows(mask))
        x, w = as_fp32(tile(m, a, of, tables[0]), of), as_fp32(tile(m, b, of, tables[1]), of)
        total = multiply_accumulate(tile(m, c, into, tables[2]), x, w, into, m.matrix_unit, saturate)
        for keep, value in zip(keeps, fragment(m, total, tables[2]), strict=True):
            keep(m, value, mask)

    return run


def matrix_rows(m, addresses, count):
    """Addresses of the 8 rows of each of ``count`` matrices: [warps, count, 8]."""
    return m.spread(addresses).reshape(m.warps, WARP)[:, : 8 * count].reshape(m.warps, count, 8)


def _matrix_places(m, addresses, count, transposed):
    """(addresses, width) of what each lane takes of each matrix, [lanes] a matrix; twice 2 bytes if transposed."""
    rows = matrix_rows(m, addresses, count)
    for i in range(count):
        if transposed:
            for j in range(2):
                yield i, j, (rows[:, i, 2 * _PLACE + j] + np.uint32(2) * _GROUP.astype(np.uint32)).reshape(-1)
        else:
            yield i, 0, (rows[:, i, _GROUP] + np.uint32(4) * _PLACE.astype(np.uint32)).reshape(-1)


def _check_rows(rows):
    if (rows & np.uint32(15)).any():
        raise Fault("a matrix row that is not aligned to 16 bytes")


def _count(m, kind, rows):
    """The 8 rows of one matrix are accessed at once."""
    if m.counters and rows.size:
        groups = np.repeat(np.arange(rows.size // 8), 8)
        m.counters.shared(kind, groups, rows.reshape(-1).astype(np.int64), 16)


@opcode("ldmatrix")
def load_matrix(instruction, kernel):
    keeps = [destination(o, kernel) for o in vector_of(instruction.operands[0])]
    addresses, transposed = address_of(instruction.operands[1], "u32", kernel), "trans" in instruction.parts

    def run(m, mask):
        m.whole_warps(mask)
        lanes = m.chosen(mask)
        at = m.spread(addresses(m))
        _check_rows(rows := matrix_rows(m, at, len(keeps))[lanes[::WARP] // WARP])
        _count(m, "matrix load", rows)
        low = None
        for i, j, places in _matrix_places(m, at, len(keeps), transposed):
            found = m.shared.load(places[lanes], 2 if transposed else 4, lanes).astype(np.uint32)
            if transposed and not j:
                low = found
                continue
            found = low | found << np.uint32(16) if transposed else found
            unravel(m, found, mask, None if mask is None else lanes, 1, "b32", keeps[i : i + 1])

    return run


@opcode("stmatrix")
def store_matrix(instruction, kernel):
    reads = [source(o, "b32", kernel) for o in vector_of(instruction.operands[1])]
    addresses, transposed = address_of(instruction.operands[0], "u32", kernel), "trans" in instruction.parts

    def run(m, mask):
        m.whole_warps(mask)
        lanes = m.chosen(mask)
        if not lanes.size:
            return
        at = m.spread(addresses(m))
        _check_rows(rows := matrix_rows(m, at, len(reads))[lanes[::WARP] // WARP])
        _count(m, "matrix store", rows)
        for i, j, places in _matrix_places(m, at, len(reads), transposed):
            values = m.spread(reads[i](m))[lanes]
            if transposed:
                values = (values >> np.uint32(16 * j)).astype(np.uint16)
            m.shared.store(places[lanes], 2 if transposed else 4, values, lanes)

    return run
