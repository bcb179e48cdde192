"""Machine instructions of executed kernels: those of memory and of matrix units are as many as PTX's."""

import subprocess

import pytest
import torch
from tiny_ptx import ptx, run

from ditq_kernels.inspect import issued
from ditq_kernels.inspect.executor.counters import Counters
from ditq_kernels.inspect.executor.parser import parse

# Turns of a loop whose number the compiler knows, or is given; one warp of the two takes more turns.
KNOWN = """
mov.u32 %r1, 0;
mov.u32 %r3, 0;
again:
ld.global.b32 %r2, [x_at];
add.u32 %r3, %r3, %r2;
add.u64 x_at, x_at, 256;
add.u32 %r1, %r1, 1;
setp.lt.u32 %p1, %r1, 12;
@%p1 bra again;
st.global.b32 [y_at], %r3;
"""
GIVEN = """
ld.global.b32 %r9, [turns];
shl.b32 %r8, warp, 2;
add.u32 %r9, %r9, %r8;
""" + KNOWN.replace("%r1, 12", "%r1, %r9")
MATRIX = """
mov.b32 %r1, 1;
mov.u32 %r9, 0;
mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r8, 0;
again:
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
  {%r5, %r6, %r7, %r8}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r5, %r6, %r7, %r8};
add.u32 %r9, %r9, 1;
setp.lt.u32 %p1, %r9, 7;
@%p1 bra again;
st.global.b32 [y_at], %r5;
"""


def found_in(body, **tensors):
    counters = Counters()
    run(body, counters=counters, **tensors)
    text = ptx(body, tensors)
    return issued.by_class(issued.issued(issued.assemble(text), parse(text), counters.entered))


def numbers(count=4096):
    return torch.zeros(count, dtype=torch.int32)


def test_an_unrolled_loop_runs_as_often_as_the_executed_one():
    """Two warps take twelve turns each."""
    found = found_in(KNOWN, x=numbers(), y=numbers())
    assert found["global memory"] == 2 * 12 + 2


def test_turns_are_those_of_each_warp():
    turns = torch.full((64,), 3, dtype=torch.int32)
    found = found_in(GIVEN, turns=turns, x=numbers(), y=numbers())
    assert found["global memory"] == 2 + 3 + (3 + 4) + 2


def test_matrix_instructions_are_counted():
    found = found_in(MATRIX, y=numbers())
    assert found["matrix"] == 2 * 7 and found["global memory"] == 2


@pytest.mark.parametrize("body", [KNOWN, GIVEN, MATRIX])
def test_the_code_is_what_ptxas_makes_anyway(body, tmp_path):
    """Whether it says its lines or not; what is said are lines of the PTX."""
    names = {"turns": 0, "x": 0, "y": 0}
    text = ptx(body, names)
    marked = issued.assemble(text)
    path = tmp_path / "plain.ptx"
    path.write_text(text)
    made = path.with_suffix(".cubin")
    subprocess.run([issued.tool("ptxas"), "-arch=sm_90a", path, "-o", made], check=True)
    plain = subprocess.run([issued.tool("nvdisasm"), "-c", made], check=True, capture_output=True, text=True).stdout
    code = [one.text for piece in marked.pieces for one, _ in piece]
    assert code == [one.text for one in issued.instructions(plain)]
    lines = text.split("\n")
    stored = [lines[line - 1] for piece in marked.pieces for one, line in piece if one.name.startswith("STG")]
    assert stored and all("st.global" in line for line in stored)


def test_an_assembler_that_refuses_is_not_passed_over():
    with pytest.raises(subprocess.CalledProcessError):
        issued.assemble(ptx("nonsense.u32 %r1;"))
