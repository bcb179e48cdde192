"""`ditq bench --steps`: steps of models are timed side by side, and who is missing or fails is named."""

import json
import time

import pytest
import torch

from ditq_kernels import cli
from ditq_kernels.benchmark import steps
from ditq_kernels.benchmark.libraries import Contender, unchanged
from ditq_kernels.benchmark.steps import BASELINE, COMPILED, EAGER
from ditq_kernels.published import MODELS, Model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def inputs():
    integers = torch.empty(2, dtype=torch.int64, device="meta")
    x = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16, device="meta")
    return dict(hidden_states=x, timestep=integers, class_labels=integers)


SMALL = Model(
    "DiTTransformer2DModel",
    dict(num_attention_heads=2, attention_head_dim=32, out_channels=8, num_layers=4, sample_size=8),
    {"transformer_blocks": "num_layers"},
    inputs,
    "small",
    calls=2,
)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setattr(steps, "ROUNDS", 2)


def broken(model):
    raise RuntimeError("no\n  such kernel")


def slow(model):
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return model


def measured(*wanted, **settings):
    return list(steps.measure(["small"], wanted, CPU, rounds=2, **settings))


def test_steps_are_timed_beside_16_bits(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compiled.append(block))
    plain, ours, *_ = steps.contenders(["w8a8"])
    timings = measured(plain, ours)
    assert [(one.name, one.way) for one in timings] == [
        (name, way) for way in (EAGER, COMPILED) for name in (BASELINE, "ditq_kernels w8a8")
    ]
    assert len(compiled) == 2 * 4 and all(one.median > 0 for one in timings)
    assert timings[0].error == 0 and 1e-4 < timings[1].error < 0.1 and timings[1].nbytes < timings[0].nbytes
    assert steps.speedup(timings, timings[1], COMPILED) == timings[2].median / timings[1].median


def test_blocks_of_many_contenders_may_be_compiled():
    limits = []
    measured(Contender("limited", "torch", lambda model: limits.append(torch._dynamo.config.recompile_limit) or model))
    assert limits == [64, 64]


def test_a_step_is_all_its_calls():
    assert measured(Contender("slow", "torch", slow))[0].lower > 2 * 50


def test_blocks_are_as_many_as_asked_for():
    found = []
    measured(
        Contender("counted", "torch", lambda model: found.append(len(model.transformer_blocks)) or model), blocks=1
    )
    measured(Contender("counted", "torch", lambda model: found.append(len(model.transformer_blocks)) or model))
    assert found == [1, 1, 4, 4]


def test_who_is_missing_or_fails_is_named():
    gone, fails = Contender("gone", "no-such-package", unchanged), Contender("ditq_kernels w8a8", None, broken)
    timings = measured(gone, fails, Contender(BASELINE, "torch", unchanged))
    table = steps.table(timings)
    assert "no-such-package is not installed" in table and "RuntimeError: no such kernel" in table
    assert [one.way for one in timings if one.median] == [EAGER, COMPILED]
    assert [one.name for one in timings if steps.is_ours_and_failed(one)] == ["ditq_kernels w8a8"] * 2


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: None)
    command = ["bench", "--steps", "--device", "cpu", "--models", "small", "--schemes", "w8a8", "--blocks", "1"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| small | eager | ditq_kernels w8a8 |" in said and "1 blocks of each kind" in said
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["blocks"] == 1 and record["cpu"] and len(record["timings"]) >= 4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "--models", "dalle"], "no model's name begins with dalle; --steps takes dit-xl-2-256, "),
        (["--steps", "--schemes", "w3a8"], "unknown scheme 'w3a8'"),
        (["--blocks", "2"], "add --steps"),
        (["--models", "dit-xl-2-512"], "or add --steps for whole models"),
    ],
)
def test_mistakes_are_said(arguments, said, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert said in capsys.readouterr().err
