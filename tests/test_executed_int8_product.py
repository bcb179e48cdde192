"""The CUDA extension's int8 product for Hopper, compiled by nvcc as setup.py compiles it, and its PTX executed on this
CPU by `ditq inspect --execute`'s executor: the quick ones of its cases, and every barrier, wait, commit and fence taken
away: its absence is found, or it is harmless for a reason that is known.
"""

import functools
import gc
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch

from ditq_kernels.inspect import execution
from ditq_kernels.inspect.cases import extension_int8 as cases
from ditq_kernels.inspect.cases.case import Case
from ditq_kernels.inspect.executor import cuda, cuda_int8, driver
from ditq_kernels.layer.extension import TILES

ROOT = Path(__file__).parent.parent
PING_PONG, COOPERATIVE = 3, 1  # the tiles of each schedule that are executed the fastest with all their stages
pytestmark = pytest.mark.skipif(
    cuda.why_unavailable() is not None, reason=f"csrc cannot be compiled: {cuda.why_unavailable()}"
)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """As a process that only executes, execution.prepare_process."""
    threads, threshold = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(execution.OBJECTS_BETWEEN_COLLECTIONS)
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()
    torch.set_num_threads(threads)


def outcome_of(case, monkeypatch, change=None):
    """The outcome of a case, by a driver that is not Triton's active one."""
    session = driver.Session(cuda_int8.ARCHITECTURE, cuda_int8.SHARED_BYTES, change=change)
    monkeypatch.setattr(driver, "installed", lambda: session)
    return execution.run_case(case, session)


@pytest.mark.parametrize(
    "case", [case for case in cases.cases(cuda_int8.ARCHITECTURE) if case.quick], ids=lambda case: case.name
)
def test_products(case, monkeypatch):
    outcome = outcome_of(case, monkeypatch)
    assert outcome.verdict == execution.OK, outcome.said
    assert outcome.executed == outcome.launches == 1


# ---- What is taken away ----

WAIT = r"mbarrier\.try_wait[^;]*;\s*@!done bra again;"
NO_WAIT = rf"(?:(?!{WAIT})[\s\S])*?"
KINDS = {
    "cluster arrive": r"barrier\.cluster\.arrive[^;]*;",
    "cluster wait": r"barrier\.cluster\.wait[^;]*;",
    "cluster meeting": r"barrier\.cluster\.arrive[^;]*;\s*barrier\.cluster\.wait[^;]*;",
    "init": r"mbarrier\.init[^;]*;",
    "init fence": r"fence\.mbarrier_init[^;]*;",
    "wait for full": rf"{WAIT}(?={NO_WAIT}wgmma\.fence)",
    "wait for empty": rf"{WAIT}(?={NO_WAIT}expect_tx)",
    "wait at the end": rf"{WAIT}(?!{NO_WAIT}(?:wgmma\.fence|expect_tx))",
    "expect": r"mbarrier\.arrive\.expect_tx[^;]*;",
    "release": r"mbarrier\.arrive\.shared::cluster[^;]*;",
    "matrix fence": r"wgmma\.fence[^;]*;",
    "commit": r"wgmma\.commit_group[^;]*;",
    "wait for the last step": r"wgmma\.wait_group\S*\s+1;",
    "wait for the tile": r"wgmma\.wait_group\S*\s+0;",
    "vectors": r"bar\.sync\s+%r\d+, 128;",
    "turn awaited": r"bar\.sync\s+%r\d+, 256;",
    "turn given": r"bar\.arrive\s+%r\d+, 256;",
    "registers": r"setmaxnreg[^;]*;",
    "other kernels": r"griddepcontrol[^;]*;",
}
NOT_IN_COOPERATIVE = {"turn awaited", "turn given"}
OF_EVERY_TILE = {"cluster arrive", "cluster wait", "cluster meeting", "init", "init fence"}
HARMLESS = {
    "registers": "how many registers there are changes no value; the executor has as many as are named",
    "other kernels": "the executor launches one kernel at a time",
}
# What is said of each kind.
MANY_WAITS, UNWRITTEN = "nobody is left to arrive", "that nobody wrote"
SAID = {
    "cluster arrive": "waits for the barrier of its cluster and has not arrived",
    "cluster wait": "race: (waits at|signals) what was written by warp 0|" + UNWRITTEN,
    "cluster meeting": "race: (waits at|signals) what was written by warp 0|" + UNWRITTEN,
    "init": f"waits at shared memory {UNWRITTEN}|not initialised|" + MANY_WAITS,
    "init fence": "race: (waits at|signals) what was written by warp 0",
    "wait for full": f"{UNWRITTEN}|tensor copy that was not waited for",
    "wait for empty": "race: overwrites what was (read by a matrix instruction|written by a tensor copy)",
    "wait at the end": "may end before its shared memory is reached by warp",
    "expect": MANY_WAITS,
    "release": MANY_WAITS,
    "matrix fence": r"registers that were touched enter a matrix instruction without a wgmma\.fence",
    "commit": "a matrix instruction that was not waited for",
    "wait for the last step": "overwrites what was read by a matrix instruction that was not waited for",
    "wait for the tile": "touches the sums of a matrix instruction that was not waited for",
    "vectors": "race: (overwrites what was read|reads what was written) by warp",
    "turn awaited": f"reads shared memory {UNWRITTEN}|race: reads",  # on a GPU: "unspecified launch failure"
    "turn given": "nobody is left to arrive|wait for ever",
}


def computation(tile, kind=None):
    """Two tiles one after the other, of as many steps as there are stages: every one is used again, by a ping-pong's
    other warpgroup. The vectors are written again in a warpgroup's second tile.
    """
    shape, tiles = TILES[tile], 3 if kind == "vectors" else 2
    problem = (shape.rows + 12, (tiles - 1) * shape.outputs + 8, 128 * cuda_int8.stages(shape) - 112)
    return Case("taken away", "taken away", functools.partial(cases.product, tile, problem, 1, torch.float16, None))


@functools.cache
def places(tile, kind):
    """Of a kind's instances in the tile's PTX."""
    text = cuda_int8.text_of(tile, torch.float16)
    return tuple(found.span() for found in re.finditer(KINDS[kind], text))


def without(places, instead, text):
    for start, end in sorted(places, reverse=True):
        text = text[:start] + instead + text[end:]
    return text


def is_found(tile, kind, taken, monkeypatch):
    """Whether something is wrong without ``taken``, and as it should be called."""
    outcome = outcome_of(computation(tile, kind), monkeypatch, functools.partial(without, taken, ""))
    assert outcome.verdict in (execution.OK, "FAULT"), outcome.said
    assert outcome.verdict == execution.OK or re.search(SAID[kind], outcome.said), outcome.said
    return outcome.verdict == "FAULT"


def is_reached(tile, place, monkeypatch):
    """The compiler unrolls loops, and some copies are for more steps, or fewer, than there are."""
    outcome = outcome_of(computation(tile), monkeypatch, functools.partial(without, [place], "trap;"))
    return "the kernel traps" in outcome.said


@pytest.mark.parametrize("tile", [PING_PONG, COOPERATIVE])
def test_nothing_is_found_where_nothing_is_taken_away(tile, monkeypatch):
    outcome = outcome_of(computation(tile), monkeypatch)
    assert outcome.verdict == execution.OK, outcome.said
    for kind in KINDS:
        assert bool(places(tile, kind)) == (tile == PING_PONG or kind not in NOT_IN_COOPERATIVE), kind
    waits = [places(tile, kind) for kind in KINDS if kind.startswith("wait ") and "for the" not in kind]
    text = cuda_int8.text_of(tile, torch.float16)
    assert sorted(itertools.chain(*waits)) == [found.span() for found in re.finditer(WAIT, text)]
    assert text.count("mbarrier.try_wait") == sum(map(len, waits))


@pytest.mark.parametrize("kind", [kind for kind in SAID if kind not in NOT_IN_COOPERATIVE | OF_EVERY_TILE])
def test_what_is_taken_away_in_a_cooperative_tile(kind, monkeypatch):
    """Everywhere at once."""
    assert is_found(COOPERATIVE, kind, places(COOPERATIVE, kind), monkeypatch)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("init", "wait at the end")])
def test_what_is_taken_away_in_a_ping_pong_tile(kind, monkeypatch):
    """One by one; of more than four, every other one."""
    instances = places(PING_PONG, kind)
    if kind in HARMLESS:
        assert not is_found(PING_PONG, kind, instances, monkeypatch)
        return
    instances = instances[:: 2 if len(instances) > 4 else 1]
    unnoticed = [place for place in instances if not is_found(PING_PONG, kind, [place], monkeypatch)]
    assert len(unnoticed) < len(instances)
    assert not any(is_reached(PING_PONG, place, monkeypatch) for place in unnoticed)


def test_of_the_waits_at_the_end_the_last_one_counts(monkeypatch):
    """The last tile's steps are released one after another by the same warps: who has seen the last has seen all."""
    *others, last = places(PING_PONG, "wait at the end")
    assert len(others) + 1 == cuda_int8.stages(TILES[PING_PONG])
    assert is_found(PING_PONG, "wait at the end", [last], monkeypatch)
    assert not is_found(PING_PONG, "wait at the end", others, monkeypatch)


@pytest.mark.parametrize("number", [-2, -1])
def test_a_barrier_that_is_not_begun(number, monkeypatch):
    """Of the last stage, the one for its arrival and the one for its release."""
    assert is_found(PING_PONG, "init", [places(PING_PONG, "init")[number]], monkeypatch)


# ---- What csrc says, too ----


def test_the_launch_is_that_of_the_extension():
    kernel = (ROOT / "csrc" / "int8_product.cuh").read_text()
    number = lambda name: int(re.search(rf"\b{name} = (\d+)[ ;*]", kernel)[1])  # noqa: E731
    assert number("STEP") == cuda_int8.STEP
    assert (1 + number("CONSUMERS")) * number("WARPGROUP") == cuda_int8.THREADS
    assert number("BAND") == cases.BAND
    assert "SHARED_BYTES = 227 * 1024;" in kernel and cuda_int8.SHARED_BYTES == 227 * 1024
    assert "stage_bytes = x_bytes + Tile::outputs * STEP;" in kernel and "x_bytes = Tile::rows * STEP;" in kernel
    assert "vector_bytes = CONSUMERS * 2 * Tile::outputs * 4;" in kernel
    assert "stages = fitting < barrier_bytes / 16 ? fitting : barrier_bytes / 16;" in kernel
    assert "shared_bytes = stages * stage_bytes + vector_bytes + barrier_bytes;" in kernel
    for tile in TILES:
        stage, vectors = (tile.rows + tile.outputs) * number("STEP"), number("CONSUMERS") * 2 * tile.outputs * 4
        others = vectors + number("barrier_bytes")
        stages = min((227 * 1024 - others) // stage, number("barrier_bytes") // 16)
        assert cuda_int8.shared_bytes(tile) == stages * stage + others
        assert cuda_int8.stages(tile) == stages
    launch = (ROOT / "csrc" / "int8_product.cu").read_text()
    assert "blockDim = dim3((1 + CONSUMERS) * WARPGROUP);" in launch
    assert "describe(qx, p.qx, p.rows, p.inputs, Tile::rows)" in launch
    assert "describe(qweight, p.qweight, p.outputs, p.inputs, P::slice)" in launch


def test_flags_are_those_of_the_build():
    spec = importlib.util.spec_from_file_location("ditq_setup", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    units = {unit.source: unit for unit in build.gpu_library(build.Toolchain("nvcc", Path("torch"))).units}
    of_the_host = re.compile(r"nvcc|-Xcompiler=.*|-gencode=.*")
    command = units[cuda_int8.SOURCE].command
    assert tuple(word for word in command if not of_the_host.fullmatch(word)) == cuda.FLAGS
    assert [word for word in command if word.startswith("-gencode")] == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_cases_are_of_every_tile_type_and_bias():
    """And for Hopper alone; the quick ones are of every kind of tile."""
    every = list(cases.cases(cuda_int8.ARCHITECTURE))
    assert len({case.name for case in every}) == len(every)
    for number, dtype in itertools.product(range(len(TILES)), ("bf16", "fp16")):
        assert any(f" tile {number} " in case.name and f"x {dtype} " in case.name for case in every)
    for bias in ("no", "fp32", "fp16", "bf16"):
        assert sum(f"{bias} bias" in case.name for case in every) >= 4
    assert [TILES[number].cluster for number in cases.KINDS] == [2, 2, 4]
    assert [TILES[number].schedule for number in cases.KINDS] == ["cooperative", "ping_pong", "ping_pong"]
    assert sum(case.quick for case in every) == len(cases.KINDS)
    for arch in set(execution.ARCHITECTURES) - {cuda_int8.ARCHITECTURE}:
        assert not list(cases.cases(arch))
