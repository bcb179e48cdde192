"""What executes PTX tells what must not happen from what may, on kernels of a few instructions: memories, barriers,
copies. Each is first right, and then has one thing wrong.
"""

import numpy as np
import pytest
import torch
from tiny_ptx import ptx, run

from ditq_kernels.inspect.executor import driver
from ditq_kernels.inspect.executor.copies import TensorMap
from ditq_kernels.inspect.executor.faults import UNSIGNED, Fault, Unsupported
from ditq_kernels.inspect.executor.global_memory import Region
from ditq_kernels.inspect.executor.parser import parse
from ditq_kernels.inspect.executor.program import translate


def numbers(count=64):
    return torch.arange(count, dtype=torch.int32)


def output(count=64):
    return torch.full((count,), -7, dtype=torch.int32)


def refused(message, body, **given):
    with pytest.raises(Fault, match=message):
        run(body, **given)


# Each thread writes, and reads what the thread of the same lane of the other warp wrote.
EXCHANGE = """
st.shared.b32 [at], t;
bar.sync 0;
xor.b32 %r1, at, 128;
ld.shared.b32 %r2, [%r1];
st.global.b32 [y_at], %r2;
"""


def test_warps_meet_at_barriers_and_nowhere_else():
    y = output()
    run(EXCHANGE, y=y)
    assert y.tolist() == [t ^ 32 for t in range(64)]
    refused("reads what was written by warp 1", EXCHANGE.replace("bar.sync 0;", ""), y=output())
    refused("race", EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"), y=output())
    within = EXCHANGE.replace("bar.sync 0;", "").replace("128", "4")
    run(within, y=y)  # what a warp's own lanes wrote
    assert y.tolist() == [t ^ 1 for t in range(64)]


def test_what_another_warp_reads_is_not_overwritten():
    again = "bar.sync 0;\nst.shared.b32 [at], 0;"
    run(EXCHANGE + again, y=output())
    refused("overwrites what was read by warp 1", EXCHANGE + again.replace("bar.sync 0;", ""), y=output())


def test_one_place_takes_one_value():
    same, own = "st.shared.b32 [memory], 5;", "st.shared.b32 [memory], t;"
    assert run(same, threads=32).disagreements == 0
    assert run(own, threads=32).disagreements == 31
    refused("warps write different values", own, threads=64)


def test_shared_memory_has_bounds_and_holds_nothing_at_first():
    refused("that nobody wrote", EXCHANGE.replace("st.shared.b32 [at], t;", ""), y=output())
    run("st.shared.b32 [at], t;", shared=256)
    refused("out of range", "st.shared.b32 [at], t;", shared=252)
    refused("misaligned", "st.shared.v2.b32 [at], {t, t};")
    refused("misaligned", "st.shared.b32 [at+2], t;")


def test_local_memory_is_each_threads_own():
    body = """
    .local .align 16 .b8 mine[16];
    mov.b64 %d1, mine;
    st.local.b32 [%d1+4], t;
    ld.local.b32 %r1, [%d1+4];
    st.global.b32 [y_at], %r1;
    """
    y = output()
    run(body, y=y)
    assert torch.equal(y, numbers())
    refused("local address out of range", body.replace("+4", "+16"), y=output())
    refused("local address .* misaligned", body.replace("+4", "+6"), y=output())


COPY = """
ld.global.b32 %r1, [x_at];
st.global.b32 [y_at], %r1;
"""


def test_global_memory_has_bounds():
    run(COPY, x=numbers(), y=output())
    refused("out of bounds: 4 bytes at byte 252 of x", COPY, x=numbers(63), y=output())
    refused("out of bounds: 4 bytes at byte 252 of y", COPY, x=numbers(), y=output(63))
    refused("out of bounds: 4 bytes at byte -4 of x", COPY.replace("[x_at]", "[x_at+-4]"), x=numbers(), y=output())
    refused("misaligned", COPY.replace("[x_at]", "[x_at+2]"), x=numbers(), y=output())
    vectors = COPY.replace("ld.global.b32 %r1", "ld.global.v2.b32 {%r1, %r2}")
    refused("misaligned: 8 bytes", vectors, x=numbers(80), y=output())


def test_no_tensor_is_reached_from_another():
    both = numbers(128)
    run(COPY, x=both[64:], y=both[:64])  # neighbours
    refused("out of bounds: 4 bytes at byte 256 of x", COPY.replace("[x_at]", "[x_at+4]"), x=both[:64], y=both[64:])
    refused("writes y, which shares memory with x", COPY, x=both[:64], y=both[:64])
    refused("writes y, which shares memory with x", COPY, x=both[:64], y=both[63:])


def test_gaps_between_rows_are_out_of_bounds():
    rows = torch.zeros(4, 24, dtype=torch.int32)[:, :16]
    refused("byte 64 of x, which has 352, gaps", COPY, x=rows, y=output())
    refused("byte 64 of y, which has 352, gaps", COPY, x=numbers(), y=rows)
    # With the stride of the rows: t / 16 * 24 + t % 16.
    strided = "shr.u32 %r3, t, 4; shl.b32 %r3, %r3, 5; cvt.u64.u32 %d1, %r3; add.u64 y_at, y_at, %d1;"
    machine = run(strided + COPY, x=numbers(), y=rows)
    assert torch.equal(rows.flatten(), numbers()) and machine.memory.regions[1].unwritten() == 0


def test_an_output_is_written_once_and_wholly():
    y = output()
    machine = run("setp.lt.u32 %p1, t, 40;\n@%p1 st.global.b32 [y_at], t;", y=y)
    assert machine.memory.regions[0].unwritten() == 24 * 4 and y[40:].eq(-7).all()
    run("st.global.b32 [y_at], t;\nst.global.b32 [y_at], t;", y=y)
    refused("written twice", "st.global.b32 [y_at], t;\nst.global.b32 [y_at], 3;", y=output())
    refused("lanes store different values", "st.global.b32 [y], t;", y=output())
    refused("reads y, which the same launch writes", "st.global.b32 [y_at], t;\nld.global.b32 %r1, [y_at];", y=y)
    refused("writes y, which the same launch reads", "ld.global.b32 %r1, [y_at];\nst.global.b32 [y_at], t;", y=y)


# Each thread copies 16 bytes, twice, and reads what the other warp copied the first time.
COPIES = """
shl.b32 %r1, t, 4;
cvt.u64.u32 %d1, %r1;
add.u64 %d1, x, %d1;
add.u32 %r1, %r1, %r98;
cp.async.cg.shared.global [%r1], [%d1], 16;
cp.async.commit_group; // first
cp.async.cg.shared.global [%r1+1024], [%d1], 0x10, 16;
cp.async.commit_group; // second
cp.async.wait_group 1;
bar.sync 0;
xor.b32 %r2, %r1, 512;
ld.shared.b32 %r3, [%r2];
st.global.b32 [y_at], %r3;
cp.async.wait_all;
"""
OTHERS = [4 * (t ^ 32) for t in range(64)]


def test_copies_arrive_when_they_were_waited_for():
    y = output()
    run(COPIES, x=numbers(256), y=y)
    assert y.tolist() == OTHERS
    not_waited = "reads what was written by a copy that was not waited for"
    for wrong in (
        COPIES.replace("wait_group 1", "wait_group 2"),
        COPIES.replace("cp.async.commit_group; // first", ""),  # both are one group, the newest
        COPIES.replace("cp.async.commit_group; // second", ""),  # the first group is the newest
        COPIES.replace("[%r2]", "[%r2+1024]"),  # of the second group
    ):
        refused(not_waited, wrong, x=numbers(256), y=output())
    run(COPIES.replace("[%r2]", "[%r2+1024]").replace("group 1", "group 0"), x=numbers(256), y=y)
    assert y.tolist() == OTHERS
    refused("reads what was written by warp 1", COPIES.replace("bar.sync 0;", ""), x=numbers(256), y=output())
    own = COPIES.replace("bar.sync 0;", "").replace("512", "0")
    run(own, x=numbers(256), y=output())
    refused("the kernel ends before copies", COPIES.replace("cp.async.wait_all;", ""), x=numbers(256), y=y)


def test_a_copy_may_fill_with_zeros():
    y = output()
    run(COPIES.replace("[%r1], [%d1], 16;", "[%r1], [%d1], 16, 0;"), x=numbers(256), y=y)
    assert y.eq(0).all()
    refused("a copy of 8 of 16 bytes", COPIES.replace("0x10, 16;", "0x10, 8;"), x=numbers(256), y=y)


# Warps 0 and 1 exchange among themselves, and 2 and 3, by barriers of their own.
PAIRS = """
add.u32 %r9, warp, 2;
shr.u32 %r9, %r9, 1; // 1 or 2
st.shared.b32 [at], t;
setp.eq.u32 %p1, %r9, 1;
@!%p1 bra OTHERS;
bar.sync 1, 64;
bra MET;
OTHERS:
bar.sync 2, 64;
MET:
xor.b32 %r1, at, 128;
ld.shared.b32 %r2, [%r1];
st.global.b32 [y_at], %r2;
"""


def test_barriers_of_some_warps():
    y = output(128)
    run(PAIRS, threads=128, y=y)
    assert y.tolist() == [t ^ 32 for t in range(128)]
    refused("written by warp 2", PAIRS.replace("128", "256"), threads=128, y=output(128))  # of the other pair
    unlike = PAIRS.replace("1, 64", "1, 128").replace("2, 64", "1, 64")
    refused("with 64 and with 128", unlike, threads=128, y=output(128))
    refused("reached by some threads of a block only", PAIRS.replace("2, 64", "2, 128"), threads=128, y=output(128))


def test_a_barrier_whose_number_each_warp_computes():
    before, _, after = PAIRS.partition("setp.eq.u32 %p1, %r9, 1;")
    own = f"{before}bar.sync %r9, 64;{after.partition('MET:')[2]}"
    y = output(128)
    run(own, threads=128, y=y)
    assert y.tolist() == [t ^ 32 for t in range(128)]
    run(own.replace("bar", "setp.lt.u32 %p1, warp, 4;\n@%p1 bar"), threads=128, y=y)
    refused("written by warp 2", own.replace("at, 128", "at, 256"), threads=128, y=output(128))  # of the other pair
    refused("reached by some threads of a block only", own.replace("%r9, 64", "%r9, 128"), threads=128, y=output(128))
    refused("some of its lanes only", own.replace("%r9, 64", "lane, 64"), threads=128, y=output(128))


ONE_WAY = """
setp.eq.u32 %p1, warp, 0;
@%p1 st.shared.b32 [at], t;
@%p1 bar.arrive 1, 64;
@!%p1 bar.sync 1, 64;
@!%p1 ld.shared.b32 %r1, [at+-128];
@!%p1 st.global.b32 [y_at], %r1;
"""


def test_who_only_arrives_does_not_wait():
    y = output()
    run(ONE_WAY, y=y)
    assert y[32:].tolist() == list(range(32))
    refused("written by warp 0", ONE_WAY.replace("@!%p1 bar.sync 1, 64;", ""), y=output())
    refused("reached by some threads", ONE_WAY.replace("@%p1 bar.arrive 1, 64;", ""), y=output())
    twice = ONE_WAY.replace("bar.arrive 1, 64;", "bar.arrive 1, 96;\n@%p1 bar.arrive 1, 96;").replace("1, 64", "1, 96")
    refused("arrives twice", twice, y=output())


def test_who_only_arrives_neither_tells_nor_learns_what_comes_later():
    late = ONE_WAY.replace("@%p1 bar.arrive 1, 64;", "@%p1 bar.arrive 1, 64;\n@%p1 st.shared.b32 [at], 77;")
    refused("race", late, y=output())


@pytest.mark.parametrize("count", [32, 48])
def test_a_barrier_of_too_few_threads(count):
    refused("at once|no whole warps", f"bar.sync 1, {count};")


def test_a_barrier_that_some_threads_miss():
    body = "setp.eq.u32 %p1, {}, 0;\n@%p1 bra SKIP;\nbar.sync 0;\nSKIP:\nbar.sync 1;"
    refused("reached by some threads", body.format("warp"))
    refused("some of its lanes only", body.format("lane"))
    run("setp.eq.u32 %p1, warp, 0;\n@%p1 ret;\nbar.sync 0;")  # who has ended is not waited for


# Warp 0 writes three lines into one place, and warp 1 reads each before the next: two mbarriers, full and empty.
PIPELINE = """
setp.ne.u32 %p1, t, 0;
@%p1 bra READY;
mbarrier.init.shared::cta.b64 [memory+1024], 32;
mbarrier.init.shared::cta.b64 [memory+1032], 32;
READY:
bar.sync 0;
mov.b32 %r1, 0;
setp.ne.u32 %p2, warp, 0;
@%p2 bra CONSUME;
setmaxnreg.dec.sync.aligned.u32 40;
PRODUCE:
and.b32 %r2, %r1, 1;
xor.b32 %r3, %r2, 1;
EMPTY:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [memory+1032], %r3;
@!%p3 bra EMPTY;
shl.b32 %r4, %r1, 8;
add.u32 %r4, %r4, lane;
st.shared.b32 [at], %r4;
mbarrier.arrive.shared::cta.b64 _, [memory+1024];
add.u32 %r1, %r1, 1;
setp.lt.u32 %p4, %r1, 3;
@%p4 bra PRODUCE;
bra END;
CONSUME:
setmaxnreg.inc.sync.aligned.u32 256;
TURN:
and.b32 %r2, %r1, 1;
FULL:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [memory+1024], %r2;
@!%p3 bra FULL;
ld.shared.b32 %r4, [at+-128];
st.global.b32 [y_at+-128], %r4;
add.u64 y_at, y_at, 128;
mbarrier.arrive.shared::cta.b64 _, [memory+1032];
add.u32 %r1, %r1, 1;
setp.lt.u32 %p4, %r1, 3;
@%p4 bra TURN;
END:
bar.sync 0;
"""
WAITS_FULL, WAITS_EMPTY = "@!%p3 bra FULL;", "@!%p3 bra EMPTY;"


def test_producers_and_consumers_meet_at_mbarriers():
    y = output(96)
    run(PIPELINE, y=y)
    assert y.tolist() == [256 * turn + lane for turn in range(3) for lane in range(32)]
    refused("reads what was written by warp 0|nobody wrote", PIPELINE.replace(WAITS_FULL, ""), y=output(96))
    # The producer runs ahead, and the phase that the consumer waits for has gone.
    refused("nobody is left to arrive", PIPELINE.replace(WAITS_EMPTY, ""), y=output(96))
    never = PIPELINE.replace("mbarrier.arrive.shared::cta.b64 _, [memory+1024];", "")
    refused("nobody is left to arrive", never, y=output(96))
    refused("nobody is left to arrive", PIPELINE.replace("[memory+1024], 32", "[memory+1024], 33"), y=output(96))
    refused("more arrivals", PIPELINE.replace("_, [memory+1024];", "_, [memory+1024], 33;"), y=output(96))
    uninitialised = PIPELINE.replace("mbarrier.init.shared::cta.b64 [memory+1032], 32;", "")
    refused("nobody wrote", uninitialised, y=output(96))
    refused("waits at what was written by warp 0|arrives at", PIPELINE.replace("READY:\nbar.sync 0;", "READY:"), y=y)


def test_a_wait_that_other_phases_do_not_end():
    body = """
    setp.eq.u32 %p1, t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [memory], 32;
    @%p1 mbarrier.init.shared::cta.b64 [memory+8], 1;
    bar.sync 0;
    setp.eq.u32 %p1, warp, 0;
    @%p1 bra OTHER;
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [memory+8], 0;
    @!%p2 bra WAIT;
    OTHER:
    mbarrier.arrive.shared::cta.b64 _, [memory];
    bra OTHER;
    """
    refused("waits for ever", body)


# One box of a matrix by the copy engine, which signals an mbarrier; each thread reads 4 bytes of it.
BOX = """
mov.b64 %d1, map;
setp.eq.u32 %p1, t, 0;
@!%p1 bra READY;
mbarrier.init.shared::cta.b64 [memory+1024], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 256;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [memory], [%d1, {1, 2}], [memory+1024];
READY:
bar.sync 0;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [memory+1024], 0;
@!%p2 bra WAIT;
ld.shared.b32 %r1, [at];
st.global.b32 [y_at], %r1;
"""
READ_BEFORE = """
st.shared.b32 [at], t;
fence.proxy.async.shared::cta;
bar.sync 0;
ld.shared.b32 %r5, [at];
bar.sync 0;
"""


def test_tensor_copies_arrive_at_their_mbarrier():
    x = torch.arange(400, dtype=torch.int32).view(20, 20)
    matrix = x.numpy().view(np.uint32)
    extra = {"map": TensorMap(Region("x", x), matrix.view(UNSIGNED[4]), (16, 4), 0)}

    def copied(body, y):
        run(body, extra=extra, y=y)

    y = output()
    copied(BOX, y)
    assert torch.equal(y.view(16, 4), x[2:18, 1:5])
    copied(BOX.replace("{1, 2}", "{18, 6}"), y)  # over both edges: zeros
    expected = torch.zeros(16, 4, dtype=torch.int32)
    expected[:14, :2] = x[6:, 18:]
    assert torch.equal(y.view(16, 4), expected)
    for wrong, message in (
        (BOX.replace("@!%p2 bra WAIT;", ""), "a tensor copy that was not waited for"),
        (BOX.replace("_, [memory+1024], 256", "_, [memory+1024], 260"), "waits for ever"),
        (BOX.replace("_, [memory+1024], 256", "_, [memory+1024], 252"), "waits for ever"),
        (BOX.replace("READY:\nbar.sync 0;", "READY:"), "waits at what was written by warp 0"),
        (BOX.replace("READY:", "READY:\nst.shared.b32 [at], t;"), "race"),  # while the engine writes there
        ("st.shared.b32 [at], t;\nbar.sync 0;\n" + BOX, "an engine overwrites stores that no fence.proxy.async"),
        (READ_BEFORE + BOX, "an engine overwrites what was read, and no fence.proxy.async"),
    ):
        with pytest.raises(Fault, match=message):
            copied(wrong, output())
    copied("st.shared.b32 [at], t;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n" + BOX, y)


@pytest.mark.parametrize(
    "statement",
    [
        "getctarank.shared::cluster.u32 %r1, at;",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [at], 0;",
        "tcgen05.wait::ld.sync.aligned;",
        "vote.sync.ballot.b32 %r1, %p1, -1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "cvt.rz.bf16x2.f32 %r1, %r2, %r3;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2}, {%r3,%r4}, {%r5}, {%r6,%r7};",
        "mbarrier.arrive.noComplete.shared::cta.b64 %d1, [at], 1;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [%d1], 16, [at];",
        "no_such_instruction.b32 %r1, %r2;",
        # Known, with a modifier that nobody reads.
        "cvt.rni.f32.f32 %r1, %r2;",
        "cvt.rn.relu.bf16x2.f32 %r1, %r2, %r3;",
        "fma.rn.relu.f16x2 %r1, %r2, %r3, %r3;",
        "max.NaN.bf16x2 %r1, %r2, %r3;",
        "min.xorsign.abs.f32 %r1, %r2, %r3;",
        "setp.lt.ftz.f32 %p1, %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.rz.f32 %r1, %r2, %r3;",
        "tanh.approx.f32 %r1, %r2;",
        "st.async.shared::cluster.b32 [at], t;",
        "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [at];",
        "mbarrier.arrive.shared::cluster.b64 %d1, [at];",
    ],
)
def test_what_is_not_implemented_is_refused_before_anything_runs(statement):
    with pytest.raises(Unsupported):
        translate(parse(ptx(statement)))


def test_what_was_executed_is_known_by_all_that_it_was_given():
    session, x = driver.Session(90, 0), numbers(64)

    def key(text="", threads=64, tensor=x, box=(16, 4), swizzle=0, session=session):
        region = Region("x", tensor)
        described = TensorMap(region, np.zeros((8, 8)), box, swizzle)
        address = np.array([region.first], np.uint64)
        return driver._key(session, text, (1, 1, 1), threads, 0, [region], [address, described])

    assert key() == key() == key(".target sm_80") == key(tensor=x.clone())
    others = [
        key("ret;"),
        key(threads=32),
        key(tensor=x.view(8, 8)),
        key(tensor=torch.arange(100, 228, dtype=torch.int32)[::2]),
        key(tensor=x + 1),
        key(box=(8, 4)),
        key(swizzle=3),
        key(session=driver.Session(80, 0)),
    ]
    assert len({key(), *others}) == 9


def test_a_loop_without_an_end(monkeypatch):
    monkeypatch.setattr("ditq_kernels.inspect.executor.machine.MOST_STEPS", 1000)
    refused("does not end", "AGAIN:\nadd.u32 %r1, %r1, 1;\nbra AGAIN;")
