"""Matrix instructions of a warpgroup, which read shared memory on their own."""

from __future__ import annotations

import numpy as np

from .copies import swizzled
from .faults import WARP, WARPGROUP, Fault, Unsupported
from .matrices import as_fp32, fragment, left_table, sum_table, tile
from .operands import DTYPE, destination, opcode, source
from .syntax import WIDTH, Vector, registers_in
from .tensor_core import multiply_accumulate

SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # the descriptor's two bits: none, over 128, 64, 32 bytes


@opcode("wgmma")
def warpgroup_matrix_multiply(instruction, kernel):
    action = instruction.parts[1]
    if action == "fence":
        return lambda m, mask: m.whole_warps(mask)  # what it orders is looked at where a product is issued
    if action == "commit_group":
        return lambda m, mask: m.matrices.commit(mask)
    if action == "wait_group":
        newest = instruction.operands[0].bits
        return lambda m, mask: m.matrices.wait(newest, mask)
    return _matrix_async(instruction, kernel)


def _matrix_async(instruction, kernel):
    shape, into, of = instruction.parts[4:7]
    n, k = (int(part) for part in shape.removeprefix("m64n").split("k"))
    item = WIDTH[of]
    if k * item != 32:
        raise Unsupported(instruction.text)
    sums, left, right, keep_sum, *flags = instruction.operands
    if any(flag.bits != 1 for flag in flags[:2]) or (flags and item == 1):
        raise Unsupported(instruction.text)
    flips = [flag.bits for flag in flags[2:]]  # whether an operand lies with its rows along memory
    keeps = [destination(o, kernel) for o in sums.parts]
    old = [source(o, "b32", kernel) for o in sums.parts]
    keep_sum = source(keep_sum, "pred", kernel)
    from_registers = isinstance(left, Vector)
    a = [source(o, "b32", kernel) for o in left.parts] if from_registers else source(left, "u64", kernel)
    b = source(right, "u64", kernel)
    flip_a = bool(flips[0]) if len(flips) == 2 else False
    flip_b = bool(flips[-1]) if flips else False
    table, table_a = sum_table(n), left_table(item)
    written = frozenset(registers_in([sums]))
    read = frozenset(registers_in([left])) if from_registers else frozenset()

    def run(m, mask):
        groups = m.matrices.issue(instruction, mask, written, read)
        if m.counters:
            m.counters.macs[of] += 64 * n * k * len(groups)
        if from_registers:
            x = tile(m, a, of, table_a).reshape(m.warps // WARPGROUP, 64, k)[groups]
        else:
            x = described(m, a(m), groups, 64, k, of, flip_a)
        w = described(m, b(m), groups, n, k, of, flip_b)
        before = tile(m, old, into, table)
        before = np.where(m.spread(keep_sum(m))[::WARP, None, None], before, np.zeros(1, before.dtype))
        before = before.reshape(-1, 64, n)
        total = before.copy()
        total[groups] = multiply_accumulate(before[groups], as_fp32(x, of), as_fp32(w, of), into, m.matrix_unit)
        for keep, value in zip(keeps, fragment(m, total.reshape(m.warps, 16, n), table), strict=True):
            keep(m, value, mask)

    return run


def described(m, descriptor, groups, rows, k, kind, flipped):
    """[warpgroups, rows, k] in shared memory, as a matrix descriptor of each of the warpgroups ``groups`` says."""
    descriptor = m.spread(descriptor).reshape(-1, WARPGROUP * WARP)[groups]
    if (descriptor != descriptor[:, :1]).any():
        raise Fault("the lanes of a warpgroup disagree on a matrix descriptor")
    value = descriptor[:, 0].astype(np.int64)
    start, leading, stride = (((value >> at & 0x3FFF) * 16)[:, None, None] for at in (0, 16, 32))
    if (value >> 49 & 7).any():
        raise Unsupported("a base offset in a matrix descriptor")
    mode = SWIZZLES[int(descriptor[0, 0] >> np.uint64(62))]
    item = WIDTH[kind]
    span = 16 << mode  # bytes along memory before the pattern repeats
    per = 16 // item
    if flipped:
        # 16-byte chunks of rows; each chunk belongs to one input.
        chunk, inputs = np.arange(rows // per)[None, :, None], np.arange(k)[None, None, :]
        if not mode:
            raise Unsupported("a transposed operand without swizzling")
        wide = span // 16
        at = chunk % wide * 16 + chunk // wide * leading + inputs % 8 * span + inputs // 8 * stride
    else:
        row, chunk = np.arange(rows)[None, :, None], np.arange(k * item // 16)[None, None, :]
        at = row % 8 * span + row // 8 * stride + chunk * (16 if mode else leading)
    addresses = swizzled(start + at, mode)
    lanes = np.broadcast_to(groups[:, None, None] * WARPGROUP * WARP, addresses.shape)
    index = m.shared.index(addresses.reshape(-1), 16, lanes.reshape(-1)).reshape(len(groups), -1)
    if m.counters:
        m.counters.engines += len(groups) * rows * k * item
    chunks = m.shared.read_by_engine(index, groups, m.matrices.closed[groups] + 1).reshape(addresses.shape)
    elements = chunks.view(DTYPE[kind]).reshape(*addresses.shape, per)
    if flipped:
        return elements.transpose(0, 1, 3, 2).reshape(len(groups), rows, k)
    return elements.reshape(len(groups), rows, k)
