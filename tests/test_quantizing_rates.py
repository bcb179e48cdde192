"""`ditq bench --quantizing`: what is measured, beside whom, and what is said of who is missing or fails."""

import json
import time
from functools import partial

import pytest
import torch
from torch import nn

from ditq_kernels import cli
from ditq_kernels.benchmark import pictures, quantizing
from ditq_kernels.benchmark.quantizing import Quantizer, Rate
from ditq_kernels.layer.linear import QuantLinear

SHAPE = (64, 128)
OURS = Quantizer("ditq_kernels w8a8", None, "int8", partial(QuantLinear.from_linear, scheme="w8a8"))


def slow(layer, seconds):
    time.sleep(seconds)
    return layer


def broken(layer):
    raise RuntimeError("no\n  such kernel")


def measured(*quantizers, rounds=3):
    return {rate.name: rate for rate in quantizing.measure([SHAPE], quantizers, rounds)}


def test_a_rate_is_weights_over_seconds():
    found = measured(Quantizer("slow", "torch", "int8", partial(slow, seconds=0.05)))["slow"]
    assert found.version == torch.__version__ and found.shape == SHAPE
    assert 0.5 * 64 * 128 / 0.05e6 < found.lower <= found.median <= found.upper < 64 * 128 / 0.05e6


def test_each_has_a_fresh_copy_of_one_layer():
    seen = []

    def keep(layer):
        seen.append((layer, layer.weight.detach().clone()))
        layer.weight.data.zero_()
        return layer

    measured(Quantizer("one", "torch", "int8", keep), Quantizer("other", "torch", "int8", keep))
    assert len({id(layer) for layer, _ in seen}) == len(seen) == 2 * (2 + 3)
    assert all(torch.equal(weight, seen[0][1]) for _, weight in seen) and seen[0][1].any()


def test_who_is_missing_or_fails_is_named_and_the_others_go_on():
    missing = Quantizer("missing int8", "no-such-package", "int8", slow)
    found = measured(OURS, missing, Quantizer("broken int8", "torch", "int8", broken))
    assert found["missing int8"].reason == "no-such-package is not installed"
    assert found["broken int8"].reason == "RuntimeError: no such kernel"
    assert found["ditq_kernels w8a8"].median > 0
    table = quantizing.table(list(found.values()))
    assert "no-such-package is not installed" in table and "RuntimeError: no such kernel" in table


def test_ours_is_compared_with_the_fastest_of_the_same_kind_and_shape():
    rates = [
        Rate("ditq_kernels w8a8", "int8", SHAPE, "1", 300.0, 290.0, 310.0, 0.5),
        Rate("a", "int8", SHAPE, "1", 100.0, 90.0, 110.0, 8.0),
        Rate("b", "int8", SHAPE, "1", 200.0, 190.0, 210.0, None),
        Rate("c", "int8", (1, 2), "1", 900.0, 900.0, 900.0, 8.0),
        Rate("d", "int4", SHAPE, "1", 800.0, 800.0, 800.0, 8.0),
        Rate("e", "int8", SHAPE, None, reason="e is not installed"),
    ]
    assert quantizing.fastest_peer(rates, rates[0]).name == "b"
    lines = quantizing.table(rates).splitlines()
    assert "| 64 x 128 | ditq_kernels w8a8 | 1 | 300 (290 to 310) | 1.50 | 0.5 |" in lines
    assert "| 64 x 128 | b | 1 | 200 (190 to 210) |  |  |" in lines


@pytest.mark.skipif(quantizing._status("VmRSS") is None, reason="the system does not tell")
def test_temporary_memory_is_what_is_held_on_the_way():
    layer = quantizing._layer((2048, 2048))

    def convert(layer):
        taken = torch.zeros(8, *layer.weight.shape)  # 32 bytes a weight
        return nn.Linear(1, 1).requires_grad_(bool(taken.sum()))

    found = quantizing.temporary_bytes(layer, convert) / layer.weight.numel()
    assert found == pytest.approx(32, abs=2)
    assert quantizing.temporary_bytes(layer, lambda layer: layer) / layer.weight.numel() < 2


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantizing, "SHAPES", (SHAPE,))
    monkeypatch.setattr(quantizing, "QUANTIZERS", (OURS, Quantizer("gone", "no-such-package", "int8", slow)))
    monkeypatch.setattr(quantizing, "measure", partial(quantizing.measure, [SHAPE], quantizing.QUANTIZERS, rounds=2))
    monkeypatch.setattr(quantizing, "compensated_seconds", lambda: [0.5, 0.7, 0.6])
    assert cli.main(["bench", "--quantizing", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no-such-package is not installed" in printed and "w4a8_g128: 0.60 s" in printed
    record = json.loads((tmp_path / "quantizing.json").read_text())
    assert [rate["name"] for rate in record["rates"]] == ["gone", "ditq_kernels w8a8"] and record["cpu"]["threads"]
    assert (tmp_path / pictures.RATES_FILE).stat().st_size > 1000


def test_compensated_rounding_is_timed():
    assert all(seconds > 0 for seconds in quantizing.compensated_seconds((32, 128), rounds=2))
