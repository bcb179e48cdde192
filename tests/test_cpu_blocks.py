"""`ditq bench --device cpu`: what is timed, beside whom, and what is said of who is missing or fails."""

import json
import time
from functools import partial

import pytest
import torch

from ditq_kernels import cli
from ditq_kernels.benchmark import cpu_blocks, libraries, pictures
from ditq_kernels.benchmark.cpu_blocks import BASELINES, Contender, Subject, Timing
from ditq_kernels.benchmark.turns import take_turns

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Subject("small", heads=2, channels=32, side=4, batch=2)
PLAIN = tuple(Contender(name, "torch", lambda model: model) for name in BASELINES)
MEASURE = cpu_blocks.measure
OURS = Contender("ditq_kernels w8a8", None, partial(libraries.ours, scheme="w8a8"))


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(cpu_blocks, "SECONDS_OF_A_TURN", 0.0)


def slept(model, seconds):
    forward = model.transformer_blocks[0].forward
    model.transformer_blocks[0].forward = lambda *args, **kwargs: time.sleep(seconds) or forward(*args, **kwargs)
    return model


def broken(model):
    raise RuntimeError("no\n  such kernel")


def measured(*contenders, compiled=(False,)):
    return list(cpu_blocks.measure([SMALL], contenders, compiled, rounds=2))


def test_a_quantized_block_is_timed_beside_the_plain_ones():
    timings = {timing.name: timing for timing in measured(*PLAIN, OURS)}
    plain, half, ours = timings["PyTorch fp32"], timings["PyTorch bf16"], timings[OURS.name]
    assert plain.error == 0 and plain.dtype == "float32" and half.dtype == "bfloat16"
    assert 1e-4 < half.error < 2e-2 and 1e-3 < ours.error < 5e-2
    assert half.nbytes < 0.51 * plain.nbytes and ours.nbytes < 0.75 * plain.nbytes
    assert all(0 < timing.lower <= timing.median <= timing.upper for timing in timings.values())
    assert cpu_blocks.speedup(list(timings.values()), ours, "PyTorch fp32") == plain.median / ours.median


def test_time_is_that_of_the_block():
    found = measured(Contender("slow", "torch", partial(slept, seconds=0.05)))[0]
    assert 50 < found.lower <= found.upper < 200


def test_who_is_missing_or_fails_is_named_and_the_others_go_on():
    timings = measured(Contender("gone", "no-such-package", slept), Contender("broken", "torch", broken), *PLAIN)
    table = cpu_blocks.table(timings)
    assert "no-such-package is not installed" in table and "RuntimeError: no such kernel" in table
    assert [timing.name for timing in timings if timing.median] == list(BASELINES)


def test_blocks_of_many_contenders_may_be_compiled():
    limits = []
    measured(Contender("limited", "torch", lambda model: limits.append(torch._dynamo.config.recompile_limit) or model))
    assert limits == [64]


def test_compiled_blocks_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda block: compiled.append(block) or block)
    timings = measured(*PLAIN, compiled=(False, True))
    assert len(compiled) == 2 and [timing.compiled for timing in timings] == [False, False, True, True]
    assert cpu_blocks.speedup(timings, timings[2], "PyTorch fp32") == timings[3].median / timings[2].median


def test_turns_go_round_and_who_fails_has_no_more():
    order = []

    def once(name, fails=False):
        order.append(name)
        if fails and order.count(name) == 2:
            raise ValueError("enough")
        return float(len(order))

    calls = {"a": partial(once, "a"), "b": partial(once, "b", fails=True), "c": partial(once, "c")}
    found, failed = take_turns(calls, rounds=3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "a", "c"]
    assert failed == {"b": "ValueError: enough"} and found == {"a": [6.0, 8.0, 9.0], "c": [5.0, 7.0, 10.0]}
    assert take_turns({}, 2) == ({}, {})


def test_what_shows_progress_is_told_of_every_step():
    told = []
    list(cpu_blocks.measure([SMALL], (*PLAIN, Contender("one", None, broken)), [False], 2, lambda: told.append(1)))
    assert len(told) == cpu_blocks.steps([SMALL], PLAIN, [False], 2) + 1  # who fails has no turns


def test_a_failure_of_ours_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "SUBJECTS", (SMALL,))
    for package, code in (("torch", 0), (None, 1)):
        contenders = (*PLAIN, Contender("one", package, broken))
        monkeypatch.setattr(cpu_blocks, "CONTENDERS", contenders)
        monkeypatch.setattr(cpu_blocks, "measure", partial(MEASURE, [SMALL], contenders))
        assert cli.main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == code


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    missing = Contender("gone", "no-such-package", slept)
    monkeypatch.setattr(cpu_blocks, "SUBJECTS", (SMALL,))
    monkeypatch.setattr(cpu_blocks, "CONTENDERS", (*PLAIN, OURS, missing))
    monkeypatch.setattr(cpu_blocks, "measure", partial(cpu_blocks.measure, cpu_blocks.SUBJECTS, cpu_blocks.CONTENDERS))
    assert cli.main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no-such-package is not installed" in printed and "our products by" in printed
    record = json.loads((tmp_path / "cpu_blocks.json").read_text())
    assert {Timing(**timing).name for timing in record["timings"]} == {*BASELINES, OURS.name, "gone"}
    assert record["cpu"]["products"] and record["torch"] == torch.__version__
    assert (tmp_path / pictures.BLOCKS_FILE).stat().st_size > 1000
