"""Clusters of thread blocks, executed: what blocks do to each other's shared memory must be ordered, from the beginning
of their mbarriers to their end. Each program is first right, and then has one thing wrong.
"""

import numpy as np
import pytest
import torch
from tiny_ptx import ptx, run

from ditq_kernels.inspect.executor import driver
from ditq_kernels.inspect.executor.copies import TensorMap
from ditq_kernels.inspect.executor.faults import Fault
from ditq_kernels.inspect.executor.global_memory import Region
from ditq_kernels.inspect.executor.parser import PtxError, parse

ROUNDS = 3
MEETING = """
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
BEGINNING = """
@%p1 mbarrier.init.shared::cta.b64 [memory+2048], 1;
@%p1 mbarrier.init.shared::cta.b64 [memory+2056], CLUSTER;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed.aligned;
barrier.cluster.wait.acquire.aligned;
"""
MULTICAST = """
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [into],
    [%d2, {0, row}], [memory+2048], MASK, policy;
"""
EMPTY = """
EMPTY:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [memory+2056], before;
@!%p3 bra EMPTY;
"""
RELEASE = """
fence.proxy.async.shared::cta;
setp.lt.u32 %p5, lane, CLUSTER;
mapa.shared::cluster.u32 empty, stage, lane;
@%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [empty+2056];
"""
# Each block adds its own tiles of ``a`` to those of ``b``, of which every block of a cluster fetches its part for all:
# lane 0 of warp 0 fetches, warp 1 adds. One stage, with two mbarriers: full and empty.
PROGRAM = f"""
.reg .b32 rank, block, turn, parity, before, row, into, stage, empty;
.reg .b64 policy;
mov.u32 rank, %cluster_ctarank;
mov.u32 block, %ctaid.x;
mov.b64 %d1, a;
mov.b64 %d2, b;
mov.b32 stage, memory;
mov.b32 turn, 0;
createpolicy.fractional.L2::evict_last.b64 policy, 0f3F800000;
prefetch.tensormap [%d1];
setp.eq.u32 %p1, t, 0;
{BEGINNING}
setp.ne.u32 %p2, warp, 0;
@%p2 bra CONSUME;
setp.ne.u32 %p2, lane, 0;
@%p2 bra END;
PRODUCE:
and.b32 parity, turn, 1;
xor.b32 before, parity, 1;
{EMPTY}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+2048], 1024;
mul.lo.u32 row, block, {ROUNDS};
add.u32 row, row, turn;
shl.b32 row, row, 2;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [memory], [%d1, {{0, row}}], [memory+2048];
mul.lo.u32 into, rank, SLICE;
shl.b32 row, turn, 2;
add.u32 row, row, into;
shl.b32 into, into, 7;
add.u32 into, into, stage;
add.u32 into, into, 512;
{MULTICAST}
add.u32 turn, turn, 1;
setp.lt.u32 %p4, turn, {ROUNDS};
@%p4 bra PRODUCE;
bra END;
CONSUME:
mul.lo.u32 row, block, {ROUNDS * 512};
shl.b32 into, lane, 4;
add.u32 row, row, into;
cvt.u64.u32 %d3, row;
add.u64 %d3, y, %d3;
add.u32 into, into, stage;
TURN:
and.b32 parity, turn, 1;
FULL:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [memory+2048], parity;
@!%p3 bra FULL;
ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [into];
ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [into+512];
add.s32 %r1, %r1, %r5;
add.s32 %r2, %r2, %r6;
add.s32 %r3, %r3, %r7;
add.s32 %r4, %r4, %r8;
st.global.v4.b32 [%d3], {{%r1, %r2, %r3, %r4}};
add.u64 %d3, %d3, 512;
{RELEASE}
add.u32 turn, turn, 1;
setp.lt.u32 %p4, turn, {ROUNDS};
@%p4 bra TURN;
END:
{MEETING}
"""


def described(name, tensor, rows):
    return TensorMap(Region(name, tensor), tensor.numpy().view(np.uint32), (rows, tensor.shape[1]), 0)


def operands(cluster, blocks):
    """(tensor maps, what comes out, what ought to)."""
    a = torch.arange(blocks * ROUNDS * 4 * 32, dtype=torch.int32).view(-1, 32)
    b = 10**6 * torch.arange(ROUNDS * 4 * 32, dtype=torch.int32).view(-1, 32)
    maps = {"a": described("a", a, 4), "b": described("b", b, 4 // cluster)}
    return maps, torch.full_like(a, -7), (a.view(blocks, ROUNDS, 4, 32) + b.view(ROUNDS, 4, 32)).view(-1, 32)


def sized(body, cluster):
    for name, number in (("CLUSTER", cluster), ("SLICE", 4 // cluster), ("MASK", 2**cluster - 1)):
        body = body.replace(name, str(number))
    return body


def execute(body=PROGRAM, cluster=2, blocks=4):
    maps, y, expected = operands(cluster, blocks)
    run(sized(body, cluster), extra=maps, blocks=blocks, cluster=cluster, y=y)
    assert torch.equal(y, expected)


def without(part, instead="", body=PROGRAM):
    """``body`` with something in place of the last ``part`` of it."""
    before, found, after = body.rpartition(part)
    assert found
    return before + instead + after


def refused(message, body, **given):
    with pytest.raises(Fault, match=message):
        run(body, **(dict(blocks=2, cluster=2) | given))


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_fetch_for_each_other(cluster):
    execute(cluster=cluster)


def test_an_arrival_that_orders_needs_no_fence():
    unfenced = without("fence.mbarrier_init.release.cluster;\n")
    execute(without("arrive.relaxed.aligned", "arrive.aligned", unfenced))
    execute(without("fence.mbarrier_init.release.cluster", "fence.acq_rel.cluster"))


NO_BEGINNING = without("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;", "bar.sync 0;")
OWN_ONLY = without("stage, lane", "stage, rank", without("setp.lt.u32 %p5, lane, CLUSTER", "setp.eq.u32 %p5, lane, 0"))
WRONG = {
    "mbarriers that may not have begun": (NO_BEGINNING, "signals .*(nobody wrote|warp 0 of block)|not initialised"),
    "mbarriers whose beginning is not told": (
        without("fence.mbarrier_init.release.cluster;\n"),
        "shared memory race: signals what was written by warp 0 of block 1 of the cluster",
    ),
    "a stage that nobody released": (without(EMPTY), "race: overwrites what was (read|written) by"),
    "a stage that its own block alone released": (
        OWN_ONLY.replace("[memory+2056], CLUSTER", "[memory+2056], 1"),
        "race: overwrites what was (read|written) by .* of block 1 of the cluster|tensor copy that was not waited for",
    ),
    "arrivals that no peer makes": (OWN_ONLY, "nobody is left to arrive"),
    "a read with no proxy fence behind it": (without("fence.proxy.async.shared::cta;"), "no fence.proxy.async stands"),
    "a block that may end too early": (without(MEETING), "of a cluster may end before .* reached by warp 1 of block"),
    "too few bytes": (without(", 1024;", ", 1020;"), "waits for ever|nobody is left"),
    "too many bytes": (without(", 1024;", ", 1028;"), "waits for ever|nobody is left"),
    "a block beyond the cluster": (without("MASK", "7"), "a multicast to the blocks 0x7 of a cluster of 2"),
    "no block at all": (without("MASK", "0"), "a multicast to the blocks 0x0"),
    "an arrival beyond the cluster": (without("stage, lane", "stage, 2"), "an address in block 2 of a cluster of 2"),
    "data of one block only": (without("MASK", "1"), "waits for ever|nobody is left"),
    "an arrival at another block's, as one's own": (
        without("mbarrier.arrive.release.cluster.shared::cluster", "mbarrier.arrive.release.cta.shared::cta"),
        "out of range",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_between_blocks_is_found(what):
    body, message = WRONG[what]
    with pytest.raises(Fault, match=message):
        execute(body)


def test_nobody_reaches_a_block_that_has_ended():
    body = f"""
    mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p1, %r1, 1;
    setp.eq.u32 %p2, t, 0;
    @%p2 mbarrier.init.shared::cta.b64 [memory], 64;
    {MEETING}
    LEAVE
    mapa.u32 %r2, %r98, 1;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    WAIT
    """
    refused("block 1 of a cluster may end", body.replace("LEAVE", "@%p1 ret;").replace("WAIT", ""))
    wait = "WAIT:\n@%p1 mbarrier.try_wait.parity.shared::cta.b64 %p3, [memory], 0;\n@!%p3 bra WAIT;"
    # Who has seen all arrivals may go; block 0 sees none.
    known = body.replace("LEAVE", "setp.ne.u32 %p3, %r1, 1;").replace("[memory], 64", "[memory], 128")
    run(known.replace("WAIT", wait, 1), blocks=2, cluster=2)
    refused("block 1 of a cluster may end", known.replace("WAIT", ""))


# Each thread gives its block's other half of the cluster a number by WAY, and keeps what it was given.
EXCHANGE = """
mov.u32 %r1, %cluster_ctarank;
xor.b32 %r2, %r1, 1;
mapa.shared::cluster.u32 %r3, at, %r2;
mov.u32 %r4, %clusterid.x;
shl.b32 %r4, %r4, 1;
add.u32 %r4, %r4, %r1;
shl.b32 %r4, %r4, 8;
cvt.u64.u32 %d1, %r4;
add.u64 y_at, y_at, %d1;
add.u32 %r4, %r4, t;
WAY
st.global.b32 [y_at], %r5;
"""
BY_LOAD = f"st.shared.b32 [at], %r4;{MEETING}ld.shared::cluster.b32 %r5, [%r3];{MEETING}"
BY_STORE = f"{MEETING}st.shared::cluster.b32 [%r3], %r4;{MEETING}ld.shared.b32 %r5, [at];"
GENERIC = f"{MEETING}cvt.u64.u32 %d2, %r3;\nst.b32 [%d2], %r4;{MEETING}ld.shared.b32 %r5, [at];"


@pytest.mark.parametrize("way", [BY_LOAD, BY_STORE, GENERIC])
def test_blocks_reach_each_others_memory(way):
    body, y = EXCHANGE.replace("WAY", way), torch.zeros(4 * 64, dtype=torch.int32)
    run(body, blocks=4, cluster=2, y=y)
    assert y.view(4, 64).tolist() == [[256 * block + t for t in range(64)] for block in (1, 0, 3, 2)]
    barrier = MEETING.strip()
    for last, message in ((False, "race|nobody wrote"), (True, "may end before|race|nobody wrote")):
        first, _, after = body.rpartition(barrier) if last else body.partition(barrier)
        if way == BY_LOAD or last:
            refused(message, first + after, y=torch.zeros(128, dtype=torch.int32))
    # A meeting that orders nothing: what was done before it is not known behind it.
    relaxed = body.replace("arrive.release", "arrive.relaxed")
    refused("race", relaxed, y=torch.zeros(128, dtype=torch.int32))
    refused(
        "out of range",
        body.replace("shared::cluster.b32", "shared::cta.b32").replace("b32 [%d2]", "shared.b32 [%r3]"),
        y=torch.zeros(128, dtype=torch.int32),
    )


def test_who_has_waited_for_its_own_copy_has_not_waited_for_a_peers():
    copy = MULTICAST.strip()
    for name, instead in (("into", "memory"), ("%d2", "%d1"), ("row", "4"), ("policy", "%d2")):
        copy = copy.replace(name, instead)
    body = f"""
    mov.b64 %d1, a;
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r2, %r1, 1;
    setp.eq.u32 %p1, t, 0;
    setp.eq.and.u32 %p2, %r1, 0, %p1;
    @%p1 mbarrier.init.shared::cta.b64 [memory+2048], 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+2048], 512;
    {MEETING}
    @%p2 {copy}
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [memory+2048], 0;
    @!%p3 bra WAIT;
    {MEETING}
    mapa.shared::cluster.u32 %r3, at, %r2;
    ld.shared::cluster.b32 %r4, [%r3];
    st.global.b32 [y_at], %r4;
    {MEETING}
    """
    maps, y, _ = operands(1, 2)
    given = dict(blocks=2, cluster=2, extra={"a": maps["a"]}, y=y.view(-1)[:64])
    run(sized(body, 2), **given)
    assert y.view(-1)[:64].tolist() == list(range(128, 192))
    before, _, last = sized(body, 2).rpartition(MEETING)
    unmet = without(MEETING, body=before) + MEETING + last
    refused("reads what was written by a tensor copy that was not waited for", unmet, **given)


def test_the_barrier_of_a_cluster():
    apart = "setp.eq.u32 %p1, warp, 0;\nmov.u32 %r1, %cluster_ctarank;\nsetp.eq.and.u32 %p2, %r1, 0, %p1;\n"
    refused("the barrier of a cluster is reached by some", apart + f"@%p2 bar.sync 1, 64;{MEETING}")
    run(apart + f"@%p2 ret;{MEETING}", blocks=2, cluster=2)  # who has ended is not waited for
    refused("arrives twice", "barrier.cluster.arrive;\nbarrier.cluster.arrive;")
    refused("has not arrived", "barrier.cluster.wait;")
    lane = (
        "setp.eq.u32 %p1, lane, 0;\n@%p1 bra SKIP;\nbarrier.cluster.arrive{0};\nbarrier.cluster.wait{0};\nSKIP:\nret;"
    )
    refused("some of its lanes only", lane.format(".aligned"))
    run(lane.format(""), blocks=2, cluster=2)
    run(MEETING, blocks=1)
    refused("not made of clusters", MEETING, blocks=3)


def test_blocks_know_their_place():
    names = (
        "cluster_ctarank",
        "cluster_nctarank",
        "clusterid.x",
        "nclusterid.x",
        "cluster_ctaid.x",
        "cluster_nctaid.x",
    )
    reads = "".join(f"mov.u32 %r1, %{name};\nst.global.b32 [%d1+{4 * i}], %r1;\n" for i, name in enumerate(names))
    body = f"mov.u32 %r2, %ctaid.x;\nmul.wide.u32 %d1, %r2, 24;\nadd.u64 %d1, y, %d1;\n{reads}"
    y = torch.full((6, 6), -7, dtype=torch.int32)
    run(body, blocks=6, cluster=2, y=y)
    assert y.tolist() == [[block % 2, 2, block // 2, 3, block % 2, 2] for block in range(6)]


def launched(session, directive="", cluster=2):
    maps, y, expected = operands(2, 8)
    given = ".param .u64 y_given, " + ", ".join(f".param .align 64 .b8 {name}[128]" for name in maps)
    text = ptx(sized(PROGRAM, 2), ["y"]).replace(".param .u64 y_given", given)
    text = text.replace(".reqntid 64", f".reqntid 64, 1, 1{directive}")
    region = Region("y", y)
    values = [np.array([region.first], np.uint64), *maps.values()]
    driver.run(session, text, (8, 1, 1), [region], values, shared=4096, cluster=cluster)
    return torch.equal(y, expected)


def test_a_launch_or_the_kernel_says_how_many_blocks_make_a_cluster():
    declared = "\n.explicitcluster\n.reqnctapercluster 2, 1, 1"
    session = driver.Session(90, 0, memory={}, counts=True)
    assert launched(session)
    assert launched(session, declared, 1) and launched(session, declared, 2)
    assert session.launches[-1].repeated and session.launches[-1].counters.blocks == 8
    with pytest.raises(Fault, match="of 4 thread blocks of a kernel for clusters of 2"):
        launched(session, declared, 4)
    with pytest.raises(Fault, match="multicast to the blocks 0x3 of a cluster of 1"):
        launched(session, cluster=1)  # and not what another launch of the same text has left
    with pytest.raises(PtxError, match="along y or z"):
        parse(ptx("").replace(".reqntid 64", ".reqnctapercluster 1, 2, 1"))
    part = driver.Session(90, 0, counts=True, most_blocks=3)
    assert not launched(part) and part.launches[0].counters.blocks == 4
