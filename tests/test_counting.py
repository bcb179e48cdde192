"""What is counted of real layers' kernels: which layers, scaled how, and that what is planted in a kernel shows."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys

import pytest
from changed_kernels import INPUTS, executing, in_a_compiling_process, product, smallest, torch

from ditq_kernels import cli
from ditq_kernels.inspect import counted, counting
from ditq_kernels.inspect.bounds import GPUS, Gpu, bounds, plain_bound
from ditq_kernels.inspect.cases.case import Mismatch
from ditq_kernels.inspect.counted import Count, Loop, Subject
from ditq_kernels.inspect.executor.counters import Counters, Passes, Requests
from ditq_kernels.inspect.executor.driver import Launch
from ditq_kernels.inspect.machine_code import MACS_PER_CLOCK
from ditq_kernels.shapes import LAYERS


def test_every_layer_of_the_models_is_counted():
    subjects = counted.subjects()
    assert len({one.name for one in subjects}) == len(subjects)
    for layer in LAYERS:
        if layer.model in counted.MODELS:
            for rows in layer.rows:
                name = f"{rows} x {layer.out_features} x {layer.in_features}"
                of_layer = [one for one in subjects if f"{layer.model} {layer.role}" in one.layers and name in one.name]
                assert {one.fmt for one in of_layer} == ({"w4_g128"} if layer.modulation else {"w8", "w4_g128"})
    assert [one.name for one in counted.chosen("DiT-XL/2 512px mlp down")] == [
        "w8 x int8 2048 x 1152 x 4608",
        "w4_g128 x int8 2048 x 1152 x 4608",
        "w8 x int8 2048 x 1152 x 4608 csrc",
        "quantization 2048 x 4608",
    ]
    csrc = counted.chosen("DiT-XL/2 512px mlp down")[2]
    assert csrc.is_for(90) and not csrc.is_for(80) and counted.chosen("1 x 6912 x 1152 csrc")[0].is_for(80)


MACHINE = {"IMMA": 8, "BRA": 16, "BAR": 8}, 40  # of 8 warps


def launch():
    counters = Counters(blocks=4, tensors={"x": 4096, "y": 1024, "untouched": 7})
    counters.requests["load", "x"] = Requests(8, 64, 32)
    counters.requests["store", "y"] = Requests(8, 8, 8)
    counters.fetched.update(x=2048, y=256)
    counters.passes["matrix load"] = Passes(104, 100)
    counters.passes["store"] = Passes(12, 10)
    counters.engines, counters.macs["s8"] = 1280, 5 * 4096
    counters.issued.update({"ld.global": 8, "bar": 16})
    counters.waits.update({("cp", 0): 8, ("cp", 2): 4, ("wgmma", 0): 16})
    return Launch("some_kernel", (10, 2, 1), 64, 1.0, 0, {}, 0, "", counters=counters)


def test_counts_are_of_the_whole_grid():
    found = counting._count(90, Subject(("a layer",), 2, 3, 4, "w8", "int8"), launch(), MACHINE, None)
    assert found.sectors == {"load x": 320, "store y": 40} and found.sectors_least == {"load x": 160, "store y": 40}
    assert found.fetched == {"x": 10240, "y": 1280} and found.tensors == {"x": 4096, "y": 1024}
    assert found.sector_ratio == 360 / 200 and found.pass_ratio == 580 / 550 and found.fetched_again == 11520 / 5120
    assert found.issued == {"control": 3, "matrix": 1} and found.registers == 40
    assert found.ptx == {"bar": 2, "ld.global": 1} and found.waits == {"cp, 0": 1, "cp, 2": 0.5, "wgmma, 0": 2}
    assert found.over() == ["load x 2.00 (89%)", "store 1.20 (10%)"]
    assert found.engines == 6400 and found.macs == {"s8": 102400}
    (said,) = counting.lines([found])
    assert "some " in said and "10x2" in said and "1 cp, 2 wgmma" in said and said.endswith("store 1.20 (10%)")


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [(2, 32, 0, 32), (8, 32, 0, 8), (4, 128, 0, 4), (4, 129, 0, 3), (4, 16, 100 * 1024, 2), (12, 168, 227 * 1024, 1)],
)
def test_blocks_that_are_resident_at_once(warps, registers, shared, expected):
    """By their number, threads, registers (by eights) and shared memory."""
    one = counting._count(90, Subject(("a layer",), 2, 3, 4, "w8", "int8"), launch(), MACHINE, None)
    found = dataclasses.replace(one, warps=warps, registers=registers, shared_bytes=shared)
    assert found.resident == expected


def test_shared_accesses_that_ptxas_joins_are_counted_once():
    """Eight loads of PTX that became two."""
    one = launch()
    one.counters.passes["load"] = Passes(80, 40)
    one.counters.issued["ld.shared"] = 8
    found = counting._count(90, Subject(("a layer",), 2, 3, 4, "w8", "int8"), one, ({"LDS": 2}, 40), None)
    assert found.passes["load"] == 100 and found.passes_least["load"] == 50 and found.passes["matrix load"] == 520


def test_persistent_blocks_are_scaled_by_their_tiles():
    """Of 5 x 3 tiles two blocks had three."""
    loop = Loop(64, 64, 128, 4, persistent=True)
    subject = Subject(("a layer",), 300, 160, 256, "w8", "int8")
    one = launch()
    one.counters.tensors["y"] = 2 * 300 * 160
    one.counters.macs["s8"] = 3 * 64 * 64 * 256
    found = counting._count(90, subject, one, MACHINE, loop)
    assert found.tiles == 15 and (found.steps, found.stages) == (2, 4)
    assert found.macs == {"s8": 5 * 300 // 100 * 64 * 64 * 256}
    assert found.sectors["load x"] == 5 * 64
    assert found.issued == {"control": 24 / (3 * 2), "matrix": round(8 / (3 * 2), 2)}
    assert counting._count(90, subject, one, MACHINE, None).tiles == 20


def test_what_is_touched_is_no_more_than_there_is():
    found = counting._count(90, Subject(("a layer",), 2, 3, 4, "w8", "int8"), launch(), MACHINE, None)
    assert found.touched == 4096 + 1024
    less = dataclasses.replace(found, fetched={"x": 100, "y": 2048})
    assert less.touched == 100 + 1024 and less.fetched_again == 2148 / 1124


def test_bounds_are_of_the_fullest_multiprocessor():
    gpu = Gpu("a GPU", multiprocessors=8, clock_ghz=2, memory_gbs=1000, l2_bytes=64, wide_macs=1, l2_size=1)
    found = counting._count(90, Subject(("a layer",), 2, 3, 4, "w8", "int8"), launch(), MACHINE, None)
    # 20 blocks on 8 multiprocessors: one has 3 of them. In clocks: 25 of matrix units, 580 and 50 of shared memory.
    # Four instructions of each warp and block, by four schedulers. All three are resident, and wait for L2 together.
    # Of y 1024 bytes are touched, and of x 4096.
    expected = {"matrix units": 3 / 20 * 25, "shared memory": 3 / 20 * 630, "L2": 11520 / 64}
    expected |= {"issue slots": 3 / 20 * 20 * 2 * 4 / 4, "latency": 220}
    assert bounds(found, gpu) == pytest.approx({k: v / 2000 for k, v in expected.items()} | {"memory": 5120 / 1e6})
    # One is resident, whose seven steps have two places.
    alone = dataclasses.replace(found, shared_bytes=200 * 1024, steps=7, stages=2)
    assert bounds(alone, gpu)["latency"] == pytest.approx(11 * 220 / 2000)  # 3 * 7 / 2
    # On an H100 bf16's 2048 * 132 * 1.83e9 a second, or 3350 GB/s.
    assert plain_bound(4096, 3072, 3072, GPUS[90]) == pytest.approx(4096 * 3072**2 / (2048 * 132 * 1830))
    assert plain_bound(1, 3072, 3072, GPUS[90]) == pytest.approx(2 * (3072 + 3072 + 3072**2) / 3.35e6)


@pytest.mark.parametrize(
    ("arch", "int8", "plain"), [(80, 624, 312), (89, 660.6, 165.2), (90, 1979, 989), (120, 838, 209.5)]
)
def test_rates_are_the_published_ones(arch, int8, plain):
    """TOPS, and TFLOPS of bf16, without sparsity."""
    gpu = GPUS[arch]
    rates = MACS_PER_CLOCK[arch][0], gpu.wide_macs
    found = [2 * rate * gpu.multiprocessors * gpu.clock_ghz / 1e3 for rate in rates]
    assert found == pytest.approx([int8, plain], rel=0.01)


def test_the_command_prints_and_keeps(tmp_path, monkeypatch, capsys):
    def count(architectures, subjects):
        for arch in architectures:
            for subject in subjects:
                if subject.is_for(arch):
                    yield [counting._count(arch, subject, launch(), MACHINE, None)]

    monkeypatch.setattr(counting, "count", count)
    out = tmp_path / "counts.json"
    arguments = ["inspect", "--execute", "--counters", "--arch", "sm_80", "sm_90", "--match", "FLUX.1 single proj_out"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == counting.HEADER and len(printed) == 1 + 3 + 4
    kept = json.loads(out.read_text())
    assert [one["arch"] for one in kept["counts"]] == [80] * 3 + [90] * 4
    assert kept["counts"][0]["subject"]["layers"] == ["FLUX.1 single proj_out"] and kept["commit"]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == kept["counts"]


def _end(arch, subject):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_ended_is_said_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(counting, "count_subject", _end)
    assert cli.main(["inspect", "--execute", "--counters", "--arch", "sm_80", "--match", "FLUX.1 mlp down"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("by the system if memory is short: --match counts fewer products")


# A product by cp.async and ldmatrix: its rows of 128 bytes lie in shared memory with their chunks exchanged by number.
EXCHANGE = re.compile(
    r"or\.b32\s+(%r\d+), (%r\d+), %r\d+;(?=\s*xor\.b32\s+(%r\d+), \1, %r\d+;\s*xor\.b32\s+%r\d+, \3, 32;)"
)


def plainly(text):
    """The PTX, its matrices read as if chunks were not exchanged."""
    text, count = EXCHANGE.subn(r"mov.b32 \1, \2;", text)
    assert count == 1
    return text


def counts(change):
    config = smallest("w8", 1, "int8", 80)
    compute = product("w8", torch.int8, config, (4 * config.block_m, 128, INPUTS), 80)
    with executing(80) as session:
        session.counts, session.most_blocks, session.change = True, 3, change
        with contextlib.suppress(Mismatch):  # so few blocks leave most of the output as it was
            compute()
        (only,) = session.launches
    return counting._count(80, Subject(("",), *(0, 0, 0), "w8", "int8"), only, counting._machine(only), None)


@pytest.fixture(scope="module")
def as_it_is_and_changed() -> tuple[Count, Count]:
    return tuple(Count(**{**one, "subject": Subject(**one["subject"])}) for one in in_a_compiling_process(__file__))


def test_a_product_wastes_nothing(as_it_is_and_changed):
    found, _ = as_it_is_and_changed
    assert found.blocks == 3 and found.grid[0] == 8 and found.over() == []
    assert found.sector_ratio == found.pass_ratio == 1 and found.passes["matrix load"] > 0
    assert found.issued["matrix"] == found.ptx["mma"] > 0 and found.issued["integers and moves"] > 0
    assert found.waits["cp, 0"] == 1 < found.waits["cp, 4"]


def test_a_planted_bank_conflict_shows(as_it_is_and_changed):
    _, found = as_it_is_and_changed
    assert any(one.startswith("matrix load") for one in found.over()) and found.pass_ratio > counted.MOST_PASSES


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(counts(change)) for change in (None, plainly)]))
    sys.exit()
