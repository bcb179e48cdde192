"""The benchmark without a GPU: what it selects, refuses and computes from timings. Every duration here is made
up, by a stopwatch that says so; none is a measurement.
"""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from stopwatches import FakeStopwatch, SteppedStopwatch

from ditq_kernels.benchmark import checks, peers, timing
from ditq_kernels.benchmark.cases import TARGET_SHAPES, Case, model_cases, select, target_cases
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
    contenders_for,
    measure_passes,
    measure_products,
    pass_cases,
    run,
)
from ditq_kernels.benchmark.targets import TARGETS, judge
from ditq_kernels.benchmark.timing import DeviceLost, Recording, interleave, record, summarise
from ditq_kernels.layer.error_budget import product_oracle
from ditq_kernels.shapes import LAYERS, MODELS

CPU = torch.device("cpu")
CASE = Case(40, 96, 256)


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


def test_calls_that_the_host_makes_are_timed_beside():
    stopwatch, made = SteppedStopwatch(), []

    def call(x):
        made.append(x)
        stopwatch.now += 7e-6

    recording = record(call, [(1,), (2,), (3,)], stopwatch)
    assert recording.launched >= timing.CALLS_BY_HOST and recording.launched % 3 == 0
    made.clear()
    recording.launch()
    assert len(made) == recording.launched and set(made) == {1, 2, 3}
    found = interleave({"a": recording}, stopwatch, rounds=3, eager=True)["a"]
    assert found.eager == pytest.approx(7.0) and found.microseconds == pytest.approx(7.0)
    assert interleave({"a": recording}, stopwatch, rounds=3)["a"].eager is None


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
