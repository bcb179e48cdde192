"""The benchmark without a GPU: what it selects, refuses, computes from timings and writes. Every duration here is made
up, by a stopwatch that says so; none is a measurement.
"""

import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ditq_kernels import cli
from ditq_kernels.benchmark import ahead, checks, command, options, peers, pictures, report, timing, tune
from ditq_kernels.benchmark.cases import LAYERS, MODELS, TARGET_SHAPES, Case, model_cases, select, target_cases
from ditq_kernels.benchmark.ceilings import Ceilings, best, copy_bandwidth
from ditq_kernels.benchmark.contenders import (
    BASELINE,
    DTYPE,
    TORCH,
    Contender,
    Inputs,
    Prepared,
    Unavailable,
    ceiling_contenders,
    check,
    ours,
    unquantized,
)
from ditq_kernels.benchmark.elementwise import PASSES, PLAIN
from ditq_kernels.benchmark.run import (
    CaseResults,
    Result,
    Run,
    contenders_for,
    measure_passes,
    measure_products,
    pass_cases,
    run,
)
from ditq_kernels.benchmark.targets import TARGETS, judge
from ditq_kernels.benchmark.timing import DeviceLost, Recording, Timing, interleave, record, summarise
from ditq_kernels.layer.error_budget import product_oracle
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.packed_weight import PackedWeight

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
CASE = Case(40, 96, 256)
TUNED = Case(20, 32, 128)
SYNTHETIC_GPU = dict(name="SYNTHETIC, no GPU", driver="none")
SYNTHETIC_VERSIONS = dict(torch="synthetic", date="2000-01-01", commit="none")


class FakeStopwatch:
    """Does not run what it is given: every replay "takes" the same made-up time."""

    l2_bytes = 1

    def __init__(self, seconds=1e-3):
        self.duration = seconds

    def record(self, run):
        return run, "graph"

    def seconds(self, run):
        return self.duration


class SteppedStopwatch(FakeStopwatch):
    """Runs what it is given, and reads a clock that the calls themselves turn."""

    def __init__(self):
        self.now = 0.0

    def seconds(self, run):
        before = self.now
        run()
        return self.now - before


# Cases


def test_the_table_of_layers_is_consistent():
    names = [(layer.model, layer.role) for layer in LAYERS]
    assert len(set(names)) == len(names)
    sides = {}
    for layer in LAYERS:
        assert layer.rows and all(rows > 0 for rows in layer.rows)
        # Whether a row is a sample follows from the shape: otherwise one case would have to be both.
        assert sides.setdefault((layer.out_features, layer.in_features), layer.modulation) == layer.modulation
        assert not layer.modulation or max(layer.rows) <= 16
    assert {"DiT-XL/2 256px", "DiT-XL/2 512px", "DiT-B/2", "PixArt-Sigma", "SD3-medium", "FLUX.1"} == set(MODELS)


def test_cases_are_distinct_and_name_their_layers():
    cases = select()
    assert len({case.shape for case in cases}) == len(cases)
    assert {case.shape for case in model_cases()} | set(TARGET_SHAPES) == {case.shape for case in cases}
    shared = next(case for case in cases if case.shape == (4, 6912, 1152))
    assert len(shared.layers) == 3 and shared.modulation
    assert all(case.layers for case in model_cases())


def test_a_selection_is_narrowed_by_model_rows_and_quick():
    assert tuple(select(quick=True)) == target_cases() == tuple(select()[: len(TARGET_SHAPES)])
    flux = select(models=["flux"])
    assert flux[0].shape == (4096, 3072, 3072) and {case.in_features for case in flux} == {3072, 12288, 15360}
    assert {case.rows for case in select(rows=[512, 2048])} == {512, 2048}
    assert {case.shape for case in select(["DiT-XL/2"], quick=True)} < set(TARGET_SHAPES)
    with pytest.raises(ValueError, match=r"unknown model 'SDXL'.*FLUX\.1"):
        select(["SDXL"])


# Timing


def test_operands_are_copied_until_the_cache_is_cold():
    assert timing.copies_needed(100, 1000) == 30
    assert timing.copies_needed(10**9, 1000) == 2
    assert timing.copies_needed(1, 10**9) == timing.MOST_SETS


def test_a_recording_walks_over_copies_that_share_no_memory():
    stopwatch = SteppedStopwatch()
    stopwatch.l2_bytes = 1000
    seen = []

    def call(x, nothing, layer):
        assert nothing is None
        seen.append((x.data_ptr(), layer.weight.data_ptr()))
        stopwatch.now += 1e-4

    strided = torch.arange(24.0).view(4, 6).T
    copied = timing.copy_operand(strided)
    assert torch.equal(copied, strided) and copied.stride() == strided.stride()
    sets = timing.rotation((strided, None, torch.nn.Linear(3, 3)), 1000, stopwatch.l2_bytes)
    found = record(call, sets, stopwatch)
    assert (found.sets, found.calls, found.how) == (3, 12, "graph")  # about a millisecond, in whole rounds
    seen.clear()
    found.replay()
    assert len(seen) == 12 and len({x for x, _ in seen}) == len({w for _, w in seen}) == 3
    assert seen[0] == seen[3] == seen[9] and len(set(seen[:3])) == 3


class CapturingStopwatch(FakeStopwatch):
    """Like a graph, it keeps addresses alone of what it recorded."""

    def record(self, run):
        run()
        return (lambda: None), "graph"


def test_a_recording_keeps_its_operands_while_it_lives():
    found = record(lambda x: x + 1, timing.rotation((torch.zeros(4),), 1, 2), CapturingStopwatch())
    copies = [weakref.ref(x) for (x,) in found.operands]
    gc.collect()
    assert len(copies) == found.sets > 2 and all(copy() is not None for copy in copies)
    del found
    gc.collect()
    assert not any(copy() is not None for copy in copies)


def test_results_of_a_round_lie_in_different_places():
    written = []

    def call(x):
        y = x + 1
        written.append(y.data_ptr())
        return y

    record(call, timing.rotation((torch.zeros(4),), 1, 1), CapturingStopwatch())
    assert len(set(written[1:4])) == 3


def test_contenders_take_turns_and_the_median_is_over_rounds():
    stopwatch, order = SteppedStopwatch(), []

    def replay(name, durations):
        durations = iter(durations)

        def run():
            order.append(name)
            stopwatch.now += next(durations) * 1e-6

        return run

    recordings = {
        "a": Recording(replay("a", (10, 20, 90)), "graph", 10, 2),
        "b": Recording(replay("b", (40, 40, 40)), "events", 4, 2),
    }
    found = interleave(recordings, stopwatch, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found["a"].microseconds == pytest.approx(2.0)
    assert (found["a"].lower, found["a"].upper) == (pytest.approx(1.5), pytest.approx(5.5))
    assert found["b"].microseconds == pytest.approx(10.0) and found["b"].how == "events"


def test_one_that_fails_on_the_way_leaves_the_others():
    def broken():
        raise RuntimeError("out of something")

    recordings = {"bad": Recording(broken, "graph", 1, 1), "good": Recording(lambda: None, "graph", 1, 1)}
    found = interleave(recordings, SteppedStopwatch(), rounds=4)
    assert isinstance(found["bad"], RuntimeError) and found["good"].rounds == 4


def test_faster_means_faster_by_more_than_the_spread():
    recording = Recording(lambda: None, "graph", 1, 1)
    slow, fast, close = (summarise(samples, recording) for samples in ([10, 11, 12], [5, 6, 7], [9, 10, 11]))
    assert fast.beats(slow) and not slow.beats(fast) and not close.beats(slow)
    assert summarise([3.0], recording).upper == 3.0


# Checks: each must be able to fail


def results_of(*contenders, case=CASE):
    found = measure_products(case, contenders, CPU, FakeStopwatch())
    return {result.contender: result for result in found.results}


def test_contenders_of_ours_and_of_pytorch_pass_their_checks():
    found = results_of(*(c for c in TORCH if "compiled" not in c.name), *ours())
    timed = {name for name, result in found.items() if result.timing}
    assert timed >= {BASELINE, "cublas_fp16", "int_mm+scaling eager", "w8a8", "w8a8 product", "w8a8_static"}
    assert timed >= {"w8a8_g128", "w4a8_g128 product", "w4a8_g128_static", "w8a16_g128", "w4a16_g128", "w8a16"}
    assert all(found[name].check.passed for name in timed)
    reasons = {name: result.failure for name, result in found.items() if not result.timing}
    products = ("w8a8 product", "w8a8_g128 product", "w4a8_g128 product", "w8a16_g128", "w4a16_g128", "w8a16")
    assert set(reasons) == {"scaled_mm fp8 rowwise", *(f"{product} cuda" for product in products)}
    assert all(reasons.values())


def wrong(change):
    """A contender that is right but for ``change`` to its result."""

    def prepare(inputs):
        operands = (inputs.x, inputs.weight, inputs.bias)
        oracle = product_oracle(inputs.x[inputs.picked], inputs.weight, inputs.bias, DTYPE)
        return Prepared(lambda *parts: change(F.linear(*parts)), operands, 1, *oracle)

    return Contender("wrong", prepare, "ours")


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.02,
        lambda y: y.index_fill(0, torch.tensor([7]), 0.0),
        lambda y: y.index_fill(1, torch.tensor([95]), float("nan")),
        lambda y: y.roll(1, 1),
        torch.zeros_like,
    ],
    ids=["scaled", "row lost", "nan", "shifted", "zeros"],
)
def test_a_wrong_result_has_no_speed(change):
    assert results_of(wrong(lambda y: y))["wrong"].timing is not None
    result = results_of(wrong(change))["wrong"]
    assert result.timing is None and result.failure.startswith("check failed: error")


def test_an_element_that_was_never_written_is_seen():
    def prepare(inputs):
        def call(x):
            y = torch.empty(CASE.rows, CASE.out_features, dtype=DTYPE)
            y[:, :-1] = unquantized(inputs)[:, :-1].to(DTYPE)
            return y

        return Prepared(call, (inputs.x,), 1, unquantized(inputs), allowed=0.5, poisons=True)

    assert "finite outputs everywhere" in results_of(Contender("forgetful", prepare, "ours"))["forgetful"].failure
    assert not torch.are_deterministic_algorithms_enabled()


def test_of_many_rows_some_are_compared_the_ends_among_them():
    picked = checks.checked_rows(3000, CPU)
    assert len(set(picked.tolist())) == checks.CHECKED_ROWS and picked[0] == 0 and picked[-1] == 2999
    assert torch.equal(checks.checked_rows(5, CPU), torch.arange(5))


@pytest.mark.parametrize("contender", PASSES, ids=lambda contender: contender.name)
def test_passes_are_checked(contender):
    ready = contender.prepare(Case(6, 0, 64), CPU)
    assert ready.verify().passed
    assert ready.moved == 6 * 64 * (4 if contender.name == PLAIN else 3) + (0 if contender.name == PLAIN else 24)

    def off(*operands):
        result = ready.call(*operands)
        return (result[0] + 1, result[1]) if isinstance(result, tuple) else result * 1.05

    assert not dataclasses.replace(ready, call=off).verify().passed
    if contender.name != PLAIN:
        scaled = dataclasses.replace(ready, call=lambda *parts: (ready.call(*parts)[0], 2 * ready.call(*parts)[1]))
        assert not scaled.verify().passed


def test_codes_may_be_off_by_a_tie_and_no_more():
    exact = torch.tensor([[127.0, 0.5, -3.0]], dtype=torch.float64)
    for code, passes in ((0, True), (1, True), (2, False)):
        found = checks.check_codes(torch.tensor([[127, code, -3]]), torch.ones(1), exact, torch.zeros(1))
        assert found.passed is passes


# A run


def test_reasons_and_failures_are_reported_and_cost_the_others_nothing():
    def unavailable(inputs):
        raise Unavailable("not installed")

    def crashing(inputs):
        raise RuntimeError("a peer's\ninternal error")

    found = results_of(Contender("a", unavailable, "peers"), Contender("b", crashing, "peers"), TORCH[0])
    assert found["a"].failure == "not installed"
    assert found["b"].failure == "RuntimeError: a peer's internal error"
    assert found[BASELINE].timing is not None


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_that_are_not_installed_say_so(peer, monkeypatch):
    monkeypatch.setattr(peers, "versions", lambda: dict.fromkeys(peers.PACKAGES))
    with pytest.raises(Unavailable, match="is not installed"):
        peer.prepare(Inputs(CASE, CPU))


def test_modulation_layers_keep_16_bit_activations():
    found = results_of(*ours(("w8a8", "w4a16_g128")), case=Case(2, 96, 256, modulation=True))
    assert found["w4a16_g128"].timing and "16-bit activations" in found["w8a8"].failure


def test_a_run_stops_starting_cases_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr("ditq_kernels.benchmark.run.measure_ceilings", lambda *_: Ceilings(1000.0, {}))
    clock = iter((0.0, 1.0, 2.0, 100.0, 101.0)).__next__
    cases = [Case(600, 32, 64), Case(16, 32, 64)]
    seen = []
    found = run(cases, TORCH[:1], CPU, FakeStopwatch(), 50.0, after_step=lambda run: seen.append(1), clock=clock)
    assert [case.case for case in found.products] == cases[:1] and len(found.passes) == 1
    assert found.not_reached == ["M=16 N=32 K=64"] and len(seen) == 3


def test_a_lost_gpu_ends_a_run_but_not_what_it_found(monkeypatch):
    monkeypatch.setattr("ditq_kernels.benchmark.run.measure_ceilings", lambda *_: Ceilings(1000.0, {}))

    def lost(inputs):
        if inputs.case.rows == 8:
            raise DeviceLost("illegal memory access")
        return TORCH[0].prepare(inputs)

    cases = [Case(4, 32, 64), Case(8, 32, 64), Case(12, 32, 64)]
    found = run(cases, [Contender("x", lost, "ours")], CPU, FakeStopwatch())
    assert [case.case.rows for case in found.products] == [4]
    assert "M=8" in found.lost and found.not_reached == ["M=12 N=32 K=64"]


def test_passes_are_measured_once_for_each_input():
    cases = [Case(512, 64, 128), Case(512, 256, 128), Case(16, 64, 128), Case(1024, 64, 128)]
    assert [case.shape for case in pass_cases(cases)] == [(512, 0, 128), (1024, 0, 128)]
    found = measure_passes(Case(512, 0, 32), PASSES[:1], CPU, FakeStopwatch())
    assert found.kind == "pass" and found.results[0].moved == 512 * 32 * 3 + 4 * 512


def test_ceilings_are_the_best_of_their_kind():
    assert best({"w8a8 product": 5.0, "int_mm": 7.0, "cublas_bf16": 3.0, "w4a16_g128": 9.0}) == {
        "int8": (7.0, "int_mm"),
        "bf16": (3.0, "cublas_bf16"),
    }
    # 4096 bytes read and 4096 written in a made-up millisecond; a replay is calls of it.
    rate = copy_bandwidth(CPU, FakeStopwatch(1e-3), most_bytes=4096)
    assert rate == pytest.approx(8192 / 1e-3 * 1e-9)
    assert {contender.name for contender in ceiling_contenders()} <= set(best.__globals__["OPERANDS"])
    inputs = Inputs(CASE, CPU)
    assert check(ceiling_contenders()[-1].prepare(inputs), inputs).error == 0.0


# Targets


def test_targets_speak_of_contenders_and_shapes_that_exist():
    known = {contender.name for contender in (*contenders_for(None), *PASSES)}
    shapes = {case.shape for case in target_cases()} | {case.shape for case in pass_cases(target_cases())}
    for target in TARGETS:
        assert {target.contender, *target.against} <= known
        assert any(shape in target.shapes for shape in shapes), f"the quick selection cannot judge {target.text}"


def test_a_target_is_judged_by_its_worst_shape():
    target = next(target for target in TARGETS if "at M=2048" in target.text)
    cases = [(2048, 1152, 1152), (2048, 4608, 1152), (2048, 3072, 3072)]
    slow = {BASELINE: dict.fromkeys(cases, 16.0), "w8a8 product": dict(zip(cases, (8.0, 10.0, 100.0), strict=True))}
    verdict = judge(target, slow, {})
    assert (verdict.state, verdict.shape, verdict.ratio) == ("met", cases[1], pytest.approx(1.6))
    assert str(verdict).startswith("met 1.60x ≥ 1.60x") and "[M=2048 N=4608 K=1152]" in str(verdict)
    slow["w8a8 product"][cases[0]] = 20.0
    assert str(judge(target, slow, {})).startswith("missed 0.80x < 1.60x")
    assert str(judge(target, {}, {})).startswith("not measured (target 1.60x)")


def test_a_comparison_with_several_is_with_the_fastest():
    target = next(target for target in TARGETS if "_int_mm" in target.text)
    shape = (512, 64, 64)
    durations = {"w8a8 product": {shape: 10.0}, "int_mm+scaling eager": {shape: 30.0}}
    assert judge(target, durations, {}).ratio == pytest.approx(3.0)
    durations["int_mm+scaling compiled"] = {shape: 12.0}
    assert judge(target, durations, {}).ratio == pytest.approx(1.2)


def test_a_share_of_the_bandwidth_is_judged_too():
    target = next(target for target in TARGETS if "copy bandwidth" in target.text)
    shares = {"quantize": {(4096, 0, 3072): 0.9, (512, 0, 1152): 0.2}}
    assert judge(target, {}, shares).state == "met"


# Reports, from numbers that nobody measured


def synthetic_run():
    """Speeds by a formula, for the form of the report only."""
    speeds = {
        BASELINE: 400,
        "w8a8 product": 700,
        "w8a8": 620,
        "w4a8_g128 product": 660,
        "w8a16_g128": 380,
        "w4a16_g128": 370,
        "scaled_mm fp8 rowwise": 690,
        "int_mm+scaling compiled": 450,
    }
    found = Run(Ceilings(3000.0, {"bf16": (500.0, BASELINE), "int8": (900.0, "w8a8 product")}))
    for case in model_cases():
        results = []
        for index, (name, speed) in enumerate(speeds.items()):
            if case.modulation and "a8" in name:
                continue
            weight = 0.5 if "w4" in name else 1 if "8" in name and name != BASELINE else 2
            moved = int(case.out_features * case.in_features * weight + 2 * case.rows * sum(case.shape[1:]))
            microseconds = 2 + case.flops / speed * 1e-6 + moved / 2500 * 1e-3 + 0.01 * index
            duration = Timing(microseconds, 0.98 * microseconds, 1.03 * microseconds, 15, 100, 10, "graph")
            outcome = checks.Check(True, 0.0017, "synthetic")
            results.append(Result(name, "ours", duration, outcome, "route 128x128", moved=moved))
        results.append(Result("broken", "ours", None, None, failure="check failed: error nan, allowed: 0.1"))
        results.append(Result("absent", "peers", failure="absent is not installed"))
        found.products.append(CaseResults("product", case, results))
    for case in pass_cases(target_cases()):
        moved = 3 * case.rows * case.in_features
        duration = Timing(1.0 + moved / 2800 * 1e-3, 1.0, 2.0, 15, 100, 10, "graph")
        found.passes.append(CaseResults("pass", case, [Result("quantize", "ours", duration, moved=moved)]))
    found.not_reached.append("M=1 N=2 K=3")
    return found


@pytest.fixture(scope="module")
def content():
    return report.as_json(synthetic_run(), SYNTHETIC_GPU, SYNTHETIC_VERSIONS)


def test_a_report_has_its_figures_and_their_origin(content, tmp_path):
    path = tmp_path / "deep" / "results.json"
    content = json.loads(json.dumps(content))
    content["cases"][0]["results"][-2]["check"] = {"passed": False, "error": math.nan, "budget": "x"}
    report.write(path, content)
    read = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert read["version"] == report.FORMAT_VERSION and read["made_by"] == "ditq bench"
    assert {"gpu", "versions", "ceilings", "targets", "cases", "not_reached", "device_lost"} <= set(read)
    assert len(read["targets"]) == len(TARGETS)
    case = next(case for case in read["cases"] if (case["rows"], case["out_features"]) == (4096, 3072))
    records = {record["contender"]: record for record in case["results"]}
    base, product = records[BASELINE], records["w8a8 product"]
    flops = 2 * case["rows"] * case["out_features"] * case["in_features"]
    assert product["tflops"] == pytest.approx(flops / product["median_us"] / 1e6)
    assert product["ratio_to_cublas_bf16"] == pytest.approx(base["median_us"] / product["median_us"])
    assert product["gbs"] == pytest.approx(product["moved_bytes"] / product["median_us"] / 1e3)
    assert product["lower_quartile_us"] < product["median_us"] < product["upper_quartile_us"]
    assert product["config"] == "route 128x128" and product["how"] == "graph" and product["check"]["passed"]
    assert "median_us" not in records["broken"] and records["broken"]["failure"].startswith("check failed")


def test_a_table_is_readable_and_says_what_is_missing(content):
    text = report.table(content)
    print(text)
    assert "SYNTHETIC, no GPU" in text and "ceilings: copy 3000 GB/s, bf16 500 TFLOP/s (cublas_bf16)" in text
    assert "M=4096 N=3072 K=3072  (FLUX.1 attention)" in text
    assert re.search(r"w8a8 product +\d+\.\d us +[\d.]+-[\d.]+ +[\d.]+ TFLOP/s +\d+ GB/s +[\d.]+x +route 128x128", text)
    assert re.search(r"broken +check failed: error nan", text)
    assert text.count("absent: absent is not installed") == 1
    assert "not reached in the time given: M=1 N=2 K=3" in text
    lines = report.verdict_lines(synthetic_run()).splitlines()
    assert len(lines) == 1 + len(TARGETS)


def test_pictures_are_drawn(content, tmp_path):
    drawn = pictures.draw(content, tmp_path)
    assert [path.name for path in drawn] == [pictures.SPEEDUP_FILE, pictures.ROOFLINE_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_something_to_draw_nothing_is_drawn(content, tmp_path):
    empty = {**content, "cases": [], "ceilings": None}
    assert pictures.draw(empty, tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Provenance of no GPU, so that the commands' later parts can run on the CPU with a made-up stopwatch."""
    monkeypatch.setattr(command, "gpu", lambda device: dict(SYNTHETIC_GPU))
    monkeypatch.setattr("ditq_kernels.benchmark.run.measure_ceilings", lambda *_: Ceilings(1000.0, {}))
    monkeypatch.setattr(command, "select", lambda *_: [Case(4, 32, 128), Case(600, 32, 128)])
    monkeypatch.setattr(command, "contenders_for", lambda schemes: ours(("w8a8",)) + TORCH[:1])


def test_bench_writes_a_report_and_does_without_matplotlib(pretended_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = command.bench(command.BenchSettings(tmp_path / "out"), CPU, FakeStopwatch())
    printed = capsys.readouterr().out
    assert len(found.products) == 2 and len(found.passes) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    assert "(no pictures:" in printed and "targets (the worst shape of each):" in printed
    assert "w8a8 product cuda: route 'cuda' takes CUDA tensors" in printed


def test_the_commands_say_that_a_cpu_has_nothing_to_measure(monkeypatch, capsys):
    inspected = []
    monkeypatch.setattr("ditq_kernels.inspect.command.inspect_kernels", lambda: inspected.append(True) or 0)
    assert cli.main(["bench", "--device", "cpu", "--quick"]) == 0
    assert options.NOTHING_TO_MEASURE in capsys.readouterr().out and inspected == [True]
    assert cli.main(["tune", "--device", "cpu"]) == 0
    assert options.NOTHING_TO_MEASURE in capsys.readouterr().out and inspected == [True]


@pytest.mark.parametrize(
    "arguments", [("bench", "--seconds", "nan"), ("tune", "--seconds", "-1"), ("bench", "--rows", "0")]
)
def test_impossible_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2 and "is not a" in capsys.readouterr().err


# Tuning


class TunedStopwatch(SteppedStopwatch):
    """Durations by configuration, as the fake products below turn the clock."""

    def record(self, run):
        return run, "graph"


@pytest.fixture
def fake_products(monkeypatch):
    """Products by the reference, whose made-up duration is ``cost(config)``; the stopwatch that reads it."""
    from ditq_kernels.layer import reference

    stopwatch = TunedStopwatch()
    stopwatch.cost = lambda config: 1e-5
    stopwatch.spoil = lambda config, y: y

    def product_with(task, config):
        def call(*operands):
            stopwatch.now += stopwatch.cost(config)
            *activations, qweight, scale, group_code, bias = operands
            weight = PackedWeight(qweight, scale, group_code, task.fmt, task.case.in_features)
            if task.activation_bytes == 1:
                y = reference.linear_a8(*activations, weight, bias, DTYPE)
            else:
                y = reference.linear_a16(*activations, weight, bias)
            return stopwatch.spoil(config, y)

        return call

    monkeypatch.setattr(tune, "product_with", product_with)
    monkeypatch.setattr(timing, "REPLAY_SECONDS", 1e-9)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    return stopwatch


def swept(stopwatch, count=1, **options):
    return tune.sweep(tune.tasks([TUNED])[:count], CPU, stopwatch, **options)


def default_for(task):
    from ditq_kernels.kernels.config import heuristic

    return heuristic(tune.problem_of(task, tune.operands_of(task, Inputs(task.case, CPU))))


def test_tasks_come_by_importance_and_once_for_a_class_of_rows():
    cases = [Case(500, 32, 128), Case(512, 32, 128), Case(4, 32, 128, modulation=True)]
    found = tune.tasks(cases)
    assert str(found[0]) == "w8 x 8-bit, M=500 N=32 K=128"
    assert len(found) == len(tune.FAMILIES) + len(WEIGHT_FORMATS)
    assert set(tune.FAMILIES) == {(name, size) for name in WEIGHT_FORMATS for size in (1, 2)}


def test_a_configuration_enters_the_table_when_it_beats_the_heuristics(fake_products):
    task = tune.tasks([TUNED])[0]
    default = default_for(task)
    fake_products.cost = lambda config: 1e-5 if config == default else 5e-6 if config.num_stages == 4 else 2e-5
    found = swept(fake_products)
    (entry,) = found.entries
    assert entry.config != default and entry.config.num_stages == 4
    assert entry.microseconds == pytest.approx(5.0) and entry.heuristic_microseconds == pytest.approx(10.0)
    assert (entry.weights, entry.activation_bytes, entry.rows) == ("w8", 1, 32)
    assert len(found.settled) == 1 and not found.failures


def test_no_entry_where_nothing_is_faster(fake_products):
    assert swept(fake_products).entries == []


def test_a_gain_within_the_spread_is_none():
    from ditq_kernels.kernels.config import candidates

    task = tune.tasks([TUNED])[0]
    problem = tune.problem_of(task, tune.operands_of(task, Inputs(TUNED, CPU)))
    default, other = list(candidates(problem))[:2]

    def around(microseconds):
        return summarise([microseconds - 1, microseconds, microseconds + 1], Recording(lambda: None, "graph", 1, 1))

    assert tune.winner(task, problem, {default: around(10.0), other: around(9.5)}, default) is None
    assert tune.winner(task, problem, {default: around(10.0), other: around(5.0)}, default).config == other
    assert tune.winner(task, problem, {}, default) is None


def test_wrong_and_crashing_candidates_are_left_out(fake_products):
    task = tune.tasks([TUNED])[0]
    default = default_for(task)
    fake_products.cost = lambda config: 1e-5 if config == default else 1e-6

    def spoil(config, y):
        if config.route == "in_loop":
            return y + 1
        if config != default:
            raise RuntimeError("out of shared memory")
        return y

    fake_products.spoil = spoil
    found = swept(fake_products)
    assert found.entries == [] and len(found.settled) == 1
    reasons = {failure.reason.split(":")[0] for failure in found.failures}
    assert reasons == {"wrong result", "RuntimeError"}


def test_candidates_that_no_process_survived_are_not_run(fake_products):
    from ditq_kernels.kernels.config import candidates

    task = tune.tasks([TUNED])[0]
    problem = tune.problem_of(task, tune.operands_of(task, Inputs(TUNED, CPU)))
    deadly = next(config for config in candidates(problem) if config != default_for(task))
    run_on = []
    fake_products.spoil = lambda config, y: run_on.append(config) or y
    swept(fake_products, skip=frozenset({(task.family, repr(deadly))}))
    assert deadly not in run_on and len(set(run_on)) == len(list(candidates(problem))) - 1


def test_a_choice_of_the_heuristic_that_fails_is_replaced(fake_products):
    task = tune.tasks([TUNED])[0]
    default = default_for(task)

    def spoil(config, y):
        if config == default:
            raise RuntimeError("illegal instruction")
        return y

    fake_products.spoil = spoil
    (entry,) = swept(fake_products).entries
    assert entry.config != default and entry.heuristic_microseconds is None


def test_a_sweep_says_what_it_did_not_reach(fake_products):
    clock = iter([0.0, 1.0, *[1.0] * 1000]).__next__
    found = swept(fake_products, count=3, seconds=10.0, clock=clock)
    assert len(found.settled) == 3 and not found.not_reached
    found = swept(fake_products, count=3, seconds=10.0, clock=iter([0.0, *[11.0] * 9]).__next__)
    assert len(found.settled) == 0 and len(found.not_reached) == 3
    clock = iter([0.0, *[1.0] * 4, *[11.0] * 1000]).__next__  # over in the midst of the first problem
    found = swept(fake_products, count=2, seconds=10.0, clock=clock)
    assert len(found.settled) == 0 and len(found.not_reached) == 2 and found.entries == []


def test_a_lost_gpu_ends_a_sweep(fake_products):
    def spoil(config, y):
        raise DeviceLost("gone")

    fake_products.spoil = spoil
    found = swept(fake_products, count=2)
    assert "gone" in found.lost and len(found.not_reached) == 1


def test_tune_writes_a_table_that_is_read_back(fake_products, tmp_path, monkeypatch, capsys):
    from ditq_kernels.kernels import tables

    monkeypatch.setattr(command, "gpu", lambda device: dict(SYNTHETIC_GPU))
    monkeypatch.setattr(command, "select", lambda *_, **__: [TUNED])
    task = tune.tasks([TUNED])[0]
    default = default_for(task)
    fake_products.cost = lambda config: 1e-5 if config == default else 5e-6
    skipped = frozenset({(task.family, "none of them")})
    code = command.tune(None, 1000.0, tmp_path, CPU, stopwatch=fake_products, ahead=lambda *_: skipped)
    (path,) = tmp_path.iterdir()
    runs, entries = tables.read(path)
    assert code == 0 and [run["torch"] for run in runs] == [torch.__version__] and runs[0]["gpu"] == SYNTHETIC_GPU
    assert entries and entries[0].key == ("w8", 1, 32, 32, 128)
    printed = capsys.readouterr().out
    assert "2.00x the heuristic's choice" in printed and f"{path}: " in printed
    assert "its process did not survive it" in printed
    # Another sweep replaces what it settles, and no more.
    other = dataclasses.replace(entries[0], rows=4096)
    tables.write(path, SYNTHETIC_GPU["name"], [entries[0], other], runs)
    fake_products.cost = lambda config: 1e-5
    assert command.tune(None, 1000.0, tmp_path, CPU, stopwatch=fake_products, ahead=lambda *_: skipped) == 0
    runs, entries = tables.read(path)
    assert len(runs) == 2 and entries == [other]
    path.write_text("no table")
    with pytest.raises(ValueError, match="is not a table"):
        command.tune(None, 1000.0, tmp_path, CPU, stopwatch=fake_products, ahead=lambda *_: skipped)


def test_a_candidate_that_takes_its_process_down_is_named():
    lines = ["started\ta\tx", "done\ta\tx", "started\ta\ty", "failed\ta\ty\tsome reason", "started\tb\tz"]
    assert ahead.fatal(lines, 0) == [] and ahead.fatal(lines, None) == []
    assert ahead.fatal(lines, 1) == [("b", "z")]
    assert ahead.fatal(lines[:4], 1) == [("a", "y")]  # failed, and the device with it
    assert ahead.fatal(lines[:2], 1) == [] and ahead.fatal([], 1) == []


def test_each_kernel_is_compiled_ahead_once():
    pytest.importorskip("triton")
    found = ahead.distinct(tune.tasks([Case(512, 256, 128), Case(4096, 256, 128)]), CPU)
    keys = [(task.fmt, task.activation_bytes, config) for task, config in found]
    assert len(set(keys)) == len(keys) > len(tune.FAMILIES)


# make gpu


@pytest.fixture(scope="module")
def gpu_script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_script", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python_step(gpu_script, name, program, seconds=30.0, needs_gpu=False):
    return gpu_script.Step(name, lambda machine: [machine.python, "-c", program], seconds, needs_gpu)


def test_the_check_of_the_extension_imports_what_there_is(gpu_script):
    done = subprocess.run([sys.executable, "-c", gpu_script.EXTENSION_CHECK], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "extension" in done.stdout and not done.stderr


def test_a_failing_and_a_hanging_step_cost_the_others_nothing(gpu_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_script, "find_gpu", lambda python: None)
    monkeypatch.setattr(gpu_script, "find_python", lambda: sys.executable)
    hanging = "import time; print('hangs', flush=True); time.sleep(600)"
    steps = (
        python_step(gpu_script, "good", "print('first'); print('all well')"),
        python_step(gpu_script, "bad", "print('about to'); raise SystemExit(3)"),
        python_step(gpu_script, "slow", hanging, seconds=2.0),
        python_step(gpu_script, "needy", "print('never')", needs_gpu=True),
        gpu_script.Step("absent", lambda machine: "a tool is not installed", 5.0, needs_gpu=False),
        python_step(gpu_script, "last", "import os; print(os.environ['DITQ_TABLES'])"),
    )
    started = time.monotonic()
    code = gpu_script.main(["--out", str(tmp_path / "out"), "--seconds", "60"], steps)
    assert code == 1 and time.monotonic() - started < 50
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert capsys.readouterr().out.rstrip().endswith(lines[-1])
    states = {line.split()[0]: line for line in lines}
    assert re.match(r"good +ok .* all well$", states["good"])
    assert re.match(r"bad +FAILED .* exit code 3: about to$", states["bad"])
    assert re.match(r"slow +FAILED .* stopped after 2 s: hangs$", states["slow"])
    assert re.match(r"needy +skipped .* no GPU$", states["needy"])
    assert re.match(r"absent +skipped .* a tool is not installed$", states["absent"])
    assert str(tmp_path / "out" / "tables") in states["last"]
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "===== good =====\nfirst\nall well" in logs and "===== slow =====\nhangs" in logs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs.txt", "summary.txt"]


def test_the_deadline_cuts_off_the_end(gpu_script, tmp_path):
    machine = gpu_script.Machine(sys.executable, tmp_path, None)
    steps = (
        python_step(gpu_script, "long", "import time; time.sleep(600)", seconds=500.0),
        python_step(gpu_script, "rest", "print('never')"),
    )
    outcomes = gpu_script.run(steps, machine, 2.0)
    assert [outcome.state for outcome in outcomes] == ["FAILED", "FAILED"]
    assert outcomes[1].remark == "no time was left for it"


def test_all_steps_are_skipped_or_pass_where_nothing_fails(gpu_script, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_script, "find_gpu", lambda python: None)
    steps = (python_step(gpu_script, "a", "pass"), python_step(gpu_script, "b", "pass", needs_gpu=True))
    assert gpu_script.main(["--out", str(tmp_path)], steps) == 0
    assert all(step.needs_gpu for step in gpu_script.STEPS if step.name not in ("environment", "inspect"))


def test_the_script_needs_the_standard_library_only():
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); before = set(sys.modules); import gpu; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('torch', 'ditq_kernels', 'triton')])"
    )
    result = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]", result.stderr
