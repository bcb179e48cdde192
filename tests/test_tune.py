"""`ditq tune`: what is swept, what enters the table, and what a crash costs, on a made-up clock."""

import dataclasses

import pytest
import torch
from stopwatches import SteppedStopwatch

from ditq_kernels.benchmark import ahead, command, timing, tune
from ditq_kernels.benchmark.cases import Case
from ditq_kernels.benchmark.contenders import (
    DTYPE,
    Inputs,
)
from ditq_kernels.benchmark.timing import DeviceLost, Recording, summarise
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.packed_weight import PackedWeight

CPU = torch.device("cpu")
TUNED = Case(20, 32, 128)
SYNTHETIC_GPU = dict(name="SYNTHETIC, no GPU", driver="none")


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
    from ditq_kernels.kernels.estimates import heuristic

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
