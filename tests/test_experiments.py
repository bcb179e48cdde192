"""The experiments measure what they say, go on where they stopped, and their page is what their records make of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from ditq_kernels.demo.experiments import combinations, distribution, page, peers, tables, weights
from ditq_kernels.demo.experiments.__main__ import EXPERIMENTS
from ditq_kernels.demo.experiments.lab import Case, Lab, Protocol
from ditq_kernels.demo.experiments.records import Records
from ditq_kernels.demo.experiments.simulated import WeightRounding
from ditq_kernels.layer.grid import DEFAULT_ZERO_POINT
from ditq_kernels.layer.linear import QuantLinear

DOCS = Path(__file__).parent.parent / "docs"
QUICK = Protocol(pictures=2, steps=2, calibration_pictures=2)


@pytest.fixture(scope="module")
def lab():
    return Lab(QUICK)


@pytest.mark.parametrize("group", [None, 128, 64, 32])
@pytest.mark.parametrize("compensated", [False, True])
def test_simulated_weights_are_those_of_the_shipped_formats(group, compensated):
    """Which were packed and decoded; and of 8 bits those of a division and a rounding, written down once more."""
    torch.manual_seed(0)
    layer = nn.Linear(160, 24)
    x = torch.randn(300, 160)
    moment = x.T @ x
    name = f"_g{group}" if group else ""
    for scheme, rounding in (
        (f"w4a8{name}", WeightRounding(4, group, DEFAULT_ZERO_POINT, two_level=True, compensated=compensated)),
        (f"w8a8{name}", WeightRounding(8, group, "symmetric", compensated=compensated)),
    ):
        shipped = QuantLinear.from_linear(layer, scheme, input_moment=moment if compensated else None)
        found = rounding.apply(layer.weight.detach(), moment)
        torch.testing.assert_close(found, shipped.dequantized_weight())
        if not (rounding.two_level or compensated):
            width = group or 160
            padded = nn.functional.pad(layer.weight.detach(), (0, -160 % width)).view(24, -1, width)
            step = padded.abs().amax(2, keepdim=True) / 127
            torch.testing.assert_close(found, (torch.round(padded / step) * step).flatten(1)[:, :160])
        if rounding.two_level:
            assert rounding.bits_per_weight(24, 256) == pytest.approx(4 + 32 / 256 + 8 / (group or 256))


def test_a_restored_gain_is_the_originals():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 128), torch.randn(500, 128) * torch.rand(128)
    moment, clipped = x.T @ x, WeightRounding(4, 32, "eighth_level", clip=0.8)
    exact = x @ weight.T

    def gain(rounding):
        return (exact * (x @ rounding.apply(weight, moment).T)).sum(0) / exact.square().sum(0)

    assert (gain(clipped) < 0.995).all()
    torch.testing.assert_close(gain(replace(clipped, gain_restored=True)), torch.ones(8), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rule", "bits"), [("symmetric", 0), ("eighth_level", 1), ("free", 4), ("best", 4)])
def test_the_bits_of_float_groups(rule, bits):
    """A scale of 16 bits, and of the zero point as many as tell its values apart."""
    found = WeightRounding(4, 64, rule)
    assert found.bits_per_weight(24, 256) == pytest.approx(4 + (16 + bits) / 64)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_simulated_codes_have_no_more_levels_than_their_bits(bits):
    torch.manual_seed(0)
    for rule in weights.RULES:
        found = WeightRounding(bits, 64, rule).apply(torch.randn(4, 128))
        assert max(len(group.unique()) for group in found.view(-1, 64)) <= 2**bits


def test_the_weights_experiment_asks_each_question_once():
    asked = weights.roundings()
    assert len(asked) == len(set(asked)) > 60
    assert {rounding.bits for rounding in asked} == {3, 4, 6, 8}


def test_a_measured_case(lab):
    same = lab.measure(Case(dict(name="same"), lab.copy))
    assert same["psnr_db"] == [float("inf")] * 2 and "weight_snr_db" not in same
    halved = lab.measure(Case(dict(name="halved"), lambda: lab.with_weights(lambda _, weight: weight * 0.9)))
    assert halved["output_gain"] == pytest.approx(-0.1, abs=1e-6)
    assert halved["weight_snr_db"] == pytest.approx(20, abs=1e-3) == halved["output_snr_db"]
    assert max(halved["psnr_db"]) < 40


def test_an_interrupted_experiment_goes_on(lab, tmp_path):
    built = []

    def case(index):
        return Case(
            dict(index=index), lambda: built.append(index) or lab.with_weights(lambda _, w: w * (1 - index / 10))
        )

    path = tmp_path / "records.json"
    broken = Case(dict(index=3), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab.carry_out([case(1), case(2), broken], Records(path))
    assert not Records.load(path).complete and len(Records.load(path).rows) == 2
    lab.carry_out([case(1), case(2), case(3)], Records(path))
    assert built == [1, 2, 3] and Records.load(path).complete
    first = Records.load(path).rows
    lab.carry_out([case(1)], Records(path))  # anew, with the same outcome
    assert Records.load(path).rows == first[:1]
    other = Lab(replace(QUICK, steps=1))
    with pytest.raises(ZeroDivisionError):
        other.carry_out([broken], Records(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not hold an experiment's records"):
        Records.load(path)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "peers"])
def test_every_case_is_there_and_the_records_are_of_these_cases(name):
    experiment = EXPERIMENTS[name]
    records = Records.load(DOCS / "experiments" / f"{name}.json")
    cases = list(experiment.cases(Lab(experiment.PROTOCOL)))
    assert records.complete and len(records.rows) == len(cases)
    for case in cases:
        assert records.find(**case.facts) is not None, case.facts
    assert records.about["protocol"]["pictures"] == experiment.PROTOCOL.pictures


# The first and the last, or one that calibrates on fewer pictures.
@pytest.mark.parametrize(
    ("name", "index"),
    [(name, index) for name in ("calibration", "weights", "layers") for index in (0, -1)]
    + [("moments", 0), ("moments", 1), ("positions", 0)],
)
def test_cases_can_be_measured(name, index, lab):
    case = list(EXPERIMENTS[name].cases(lab))[index]
    row = lab.measure(case)
    assert len(row["psnr_db"]) == QUICK.pictures and row.items() >= case.facts.items()


def test_peers_that_are_not_installed_are_named(lab, monkeypatch):
    monkeypatch.setattr(peers, "_peers", lambda: iter([peers.Peer("absent", "absent_package", "", None, None)]))
    cases = peers.cases(lab)
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        list(cases)


def test_the_page_is_what_the_records_make_of_it():
    assert (DOCS / "experiments.md").read_text() == page.render(DOCS / "experiments")


def test_the_page_has_its_pictures_and_commands():
    text = (DOCS / "experiments.md").read_text()
    for target in re.findall(r"\]\((experiments/[^)]+)\)", text):
        assert (DOCS / target).is_file(), target
    for command in re.findall(r"-m ditq_kernels\.demo\.experiments ([a-z_ ]+)$", text, re.MULTILINE):
        assert set(command.split()) <= {*EXPERIMENTS, "page", "pictures", "distribution"}


def test_a_page_without_all_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"calibration\.json is missing; carry the experiment calibration out first"):
        page.load(tmp_path)
    Records(tmp_path / "calibration.json")._save()
    with pytest.raises(ValueError, match="is not complete"):
        page.load(tmp_path)


def test_tables_average_over_sets_before_they_resample():
    rows = [dict(psnr_db=[40.0, 41.0, 42.0]), dict(psnr_db=[42.0, 43.0, 44.0])]
    assert tables.over_sets(rows).tolist() == [41.0, 42.0, 43.0]
    assert tables.shown(torch.tensor([1.0, 1.0])) == "1.0 (1.0 to 1.0)"
    assert tables.gain(rows[1:], rows[:1]) == "+2.0 (+2.0 to +2.0)"


def test_shown_pictures_begin_with_the_original():
    names = [variant.name for variant in combinations.shown()]
    assert names[:2] == ["original", "original, bf16"] and len(names) == len(set(names))


def test_the_distribution_is_of_enough_samples():
    results = json.loads((DOCS / "experiments" / "distribution.json").read_text())
    assert results["about"]["samples"] == distribution.SAMPLES >= 5000
    assert results["about"]["steps"] == distribution.STEPS
    assert {row["scheme"] for row in results["rows"]} == {None, *distribution.SCHEMES}
    assert {"w4a8_g128", "w8a8_static", "original"} <= {row["name"] for row in results["rows"]}
