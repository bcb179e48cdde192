"""What is counted while a kernel is executed: each count on a kernel of a few instructions, whose count is known."""

import numpy as np
import pytest
import torch
from tiny_ptx import run

from ditq_kernels.inspect.executor import copies, counters
from ditq_kernels.inspect.executor.copies import TensorMap
from ditq_kernels.inspect.executor.counters import Counters, Passes, Requests


def counted(body, threads=64, shared=1 << 14, **tensors):
    counters = Counters()
    run(body, threads, shared, counters=counters, **tensors)
    return counters


def aligned(count, ahead=0):
    """Numbers that begin ``ahead`` bytes behind a sector's beginning."""
    raw = torch.zeros(count * 4 + 96, dtype=torch.int8)
    first = -raw.data_ptr() % 32 + ahead
    return raw[first : first + 4 * count].view(torch.int32)


NEIGHBOURS = "ld.global.b32 %r1, [x_at];"
APART = "shl.b64 %d1, offset, 5;\nadd.u64 %d1, x, %d1;\nld.global.b32 %r1, [%d1];"  # 128 bytes from lane to lane
ONE_FOR_ALL = "ld.global.b32 %r1, [x];"
HALF = "setp.lt.u32 %p1, lane, 16;\n@%p1 ld.global.b32 %r1, [x_at];"
WIDE = "shl.b64 %d1, offset, 2;\nadd.u64 %d1, x, %d1;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];"


@pytest.mark.parametrize(
    ("body", "ahead", "expected"),
    [
        (NEIGHBOURS, 0, Requests(2, 8, 8)),
        (NEIGHBOURS, 4, Requests(2, 10, 8)),  # begins in the middle of a sector
        (APART, 0, Requests(2, 64, 8)),
        (ONE_FOR_ALL, 0, Requests(2, 2, 2)),
        (HALF, 0, Requests(2, 4, 4)),
        (WIDE, 0, Requests(2, 32, 32)),
    ],
    ids=["neighbours", "misaligned", "apart", "one for all", "half a warp", "wide"],
)
def test_sectors_of_loads(body, ahead, expected):
    assert counted(body, x=aligned(64 * 32, ahead)).requests == {("load", "x"): expected}


def test_what_a_block_loads_again_comes_from_its_cache():
    body = NEIGHBOURS + NEIGHBOURS + "st.global.b32 [y_at], t;\n" + ONE_FOR_ALL
    found = counted(body, x=aligned(64), y=aligned(64))
    assert found.fetched == {"x": 256, "y": 256} and found.tensors == {"x": 256, "y": 256}
    strided = aligned(256)[::4]
    assert counted("ld.global.b32 %r1, [x];", x=strided).tensors == {"x": 256}


def test_tensor_copies_fetch_what_lies_inside():
    tensor = TensorMap(None, np.zeros((20, 20), np.uint32), (16, 4), 0)
    places = ((2, 1), (6, 18), (19, 19), (30, 0))
    assert [copies._box(tensor, *place)[1] for place in places] == [16 * 4 * 4, 14 * 2 * 4, 4, 0]


def test_stores_and_copies_are_counted_apart():
    body = """
    cp.async.ca.shared.global [at], [x_at], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r1, [at];
    st.global.b32 [y_at], %r1;
    """
    found = counted(body, x=aligned(64), y=aligned(64))
    assert found.requests == {("copy", "x"): Requests(2, 8, 8), ("store", "y"): Requests(2, 8, 8)}
    assert found.passes == {"copy": Passes(2, 2), "load": Passes(2, 2)}
    assert found.waits == {("cp", 0): 2} and found.issued["ld.shared"] == 2 and found.blocks == 1


STORE = "st.shared.b32 [at], t;"
IN_ONE_BANK = "shl.b32 %r1, t, 7;\nadd.u32 %r1, %r1, %r98;\nst.shared.b32 [%r1], t;"
EVERY_OTHER = "shl.b32 %r1, t, 3;\nadd.u32 %r1, %r1, %r98;\nst.shared.b32 [%r1], t;"
ALL_ALIKE = "st.shared.b32 [memory], 5;"
EIGHT_BYTES = "shl.b32 %r1, t, 3;\nadd.u32 %r1, %r1, %r98;\nst.shared.v2.b32 [%r1], {t, t};"
SIXTEEN_BYTES = "shl.b32 %r1, t, 4;\nadd.u32 %r1, %r1, %r98;\nst.shared.v4.b32 [%r1], {t, t, t, t};"
SIXTEEN_APART = SIXTEEN_BYTES.replace("t, 4", "t, 5")
SIXTEEN_ROWS = SIXTEEN_BYTES.replace("t, 4", "t, 7")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (STORE, Passes(1, 1)),
        (IN_ONE_BANK, Passes(32, 1)),
        (EVERY_OTHER, Passes(2, 1)),
        (ALL_ALIKE, Passes(1, 1)),
        (EIGHT_BYTES, Passes(2, 2)),
        (SIXTEEN_BYTES, Passes(4, 4)),
        (SIXTEEN_APART, Passes(8, 4)),
        (SIXTEEN_ROWS, Passes(32, 4)),
    ],
    ids=["words", "one bank", "two-way", "broadcast", "8 bytes", "16 bytes", "16 of 32 bytes", "16 of rows"],
)
def test_passes_of_shared_memory(body, expected):
    assert counted(body, threads=32).passes == {"store": expected}


@pytest.mark.parametrize(("shift", "passes"), [(4, 4), (5, 8), (7, 32)])
def test_matrices_are_read_row_by_row(shift, passes):
    fill = "\n".join(f"st.shared.b32 [at+{4 * i}], 0;" for i in range(0, 1024, 32))
    rows = f"{fill}\nbar.warp.sync -1;\nshl.b32 %r1, t, {shift};\nadd.u32 %r1, %r1, %r98;\n"
    read = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];"
    assert counted(rows + read, threads=32).passes["matrix load"] == Passes(passes, 4)


def test_a_branch_counts_for_the_warps_that_take_it():
    body = "setp.eq.u32 %p1, warp, 0;\n@%p1 bra END;\nadd.u32 %r1, t, 1;\nadd.u32 %r1, t, 2;\nEND:"
    straight = counted("add.u32 %r1, t, 1;\nadd.u32 %r1, t, 2;\n", threads=96).issued["add"]
    assert straight - counted(body, threads=96).issued["add"] == 2


def test_distinct_pairs():
    groups, places = np.array([1, 0, 1, 1]), np.array([7, 5, 7, 9])
    found = counters._distinct(groups, places)
    assert [one.tolist() for one in found] == [[0, 1, 1], [5, 7, 9]]
