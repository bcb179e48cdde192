"""What executes PTX, on kernels whose warps have roles of their own: branches by a table, and registers that warps give
up for others. Each is first right, and then has one thing wrong.
"""

import pytest
import torch
from tiny_ptx import run

from ditq_kernels.inspect.executor.faults import Fault
from ditq_kernels.inspect.executor.syntax import PtxError


def output(count=64):
    return torch.full((count,), -7, dtype=torch.int32)


def refused(message, body, **given):
    with pytest.raises(Fault, match=message):
        run(body, **given)


# Each warp goes where the table says: the first to the second place, the second to the first.
BY_TABLE = """
xor.b32 %r1, warp, 1;
TABLE: .branchtargets FIRST, SECOND;
brx.idx %r1, TABLE;
FIRST:
mov.b32 %r2, 10;
bra.uni BOTH;
SECOND:
mov.b32 %r2, 20;
BOTH:
bar.sync 0;
st.global.b32 [y_at], %r2;
"""


def test_a_branch_by_a_table():
    y = output()
    run(BY_TABLE, y=y)
    assert y.tolist() == [20] * 32 + [10] * 32
    run(BY_TABLE.replace("xor.b32 %r1, warp, 1", "mov.b32 %r1, 0"), y=y)
    assert y.tolist() == [10] * 64
    refused("place 3 of a table of 2", BY_TABLE.replace("warp, 1", "warp, 2"), y=output())
    with pytest.raises(PtxError, match="no label ELSEWHERE"):
        run(BY_TABLE.replace("FIRST, SECOND;", "FIRST, ELSEWHERE;"), y=output())


# The second warp wants what the first one has to give up before: 255 * 64 are the most, and 8 are given out at a time.
REGISTERS = """
setp.eq.u32 %p1, warp, 0;
@%p1 bra GIVES;
setmaxnreg.inc.sync.aligned.u32 256;
bra.uni BOTH;
GIVES:
setmaxnreg.dec.sync.aligned.u32 240;
BOTH:
bar.sync 0;
st.global.b32 [y_at], t;
"""


def test_registers_are_taken_when_others_have_given_them_up():
    run(REGISTERS, y=output())
    refused("wait for registers, and nobody", REGISTERS.replace("setmaxnreg.dec.sync.aligned.u32 240;", ""), y=output())
    late = REGISTERS.replace("BOTH:", "setp.eq.u32 %p2, 0, 0;\nBOTH:").replace("GIVES:", "GIVES:\nbar.sync 0;")
    refused("wait for registers, and nobody", late, y=output())
    refused("gives up all but 256", REGISTERS.replace("240", "256"), y=output())
    refused("as many as make 24", REGISTERS.replace("inc.sync.aligned.u32 256", "inc.sync.aligned.u32 24"), y=output())
    refused("some of its lanes only", REGISTERS.replace("warp, 0", "lane, 0"), y=output())
    for count in ("16", "20", "264"):
        refused(f"{count} registers of a thread", REGISTERS.replace("240", count), y=output())
