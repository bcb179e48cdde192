"""An evaluation of a small model: what is drawn, what stands in a row, and the command, on one process and on two."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_sources import small_dit, small_pipeline
from torch.testing import assert_close

from ditq_kernels import cli
from ditq_kernels.evaluation import report
from ditq_kernels.evaluation.run import Evaluation, Judge, Row, Settings
from ditq_kernels.evaluation.variants import NOISE_FLOOR, ORIGINAL, Variant, variants
from ditq_kernels.integrations.samplers import ClassSampler, Drawing
from ditq_kernels.integrations.source import Source

STEPS = 3
SETTINGS = Settings(pictures=5, batch=2, calibration_pictures=3)
COMPENSATED = Variant("w4a8_g32 compensated", "w4a8_g32", "compensated")
# Two features, so that five pictures are enough for a covariance.
JUDGE = Judge(
    "brightness", lambda x: torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1), 2, lambda x: x.flatten(1)[:, :3]
)


def sampler():
    source = Source(Path("small"), small_dit(heads=4, head_dim=32))
    return ClassSampler(source, Drawing(STEPS, guidance=2.0), progress=False)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    found = Evaluation(sampler(), "small", SETTINGS, tmp_path_factory.mktemp("evaluation") / "samples", JUDGE)
    for variant in (ORIGINAL, *NOISE_FLOOR, Variant("w8a8_static", "w8a8_static"), COMPENSATED):
        assert found.draw(variant) == 3
    return found


def test_what_is_evaluated():
    assert [variant.name for variant in variants(["w8a8", "w4a16_g64"])] == [
        "original",
        "original, other seeds",
        "original, bf16",
        "w8a8",
        "w4a16_g64",
        "w4a16_g64 compensated",
    ]
    assert list(variants(["w8a8", "w4a8"], roundings=["compensated"]))[-1] == Variant(
        "w4a8 compensated", "w4a8", "compensated"
    )
    with pytest.raises(ValueError, match="unknown scheme"):
        list(variants(["w3a8"]))


def test_nothing_is_drawn_twice(evaluation):
    assert evaluation.draw(COMPENSATED) == 0


def test_rows_compare_with_the_same_seeds_and_the_noise_floor_with_others(evaluation):
    rows = {v.name: evaluation.row(v) for v in (ORIGINAL, *NOISE_FLOOR, COMPENSATED)}
    original, other, half, quantized = rows.values()
    assert original.psnr_db is None and original.relative_l2_by_step is None and original.bits_per_weight is None
    assert other.psnr_db < quantized.psnr_db < half.psnr_db
    assert quantized.psnr_interval_db[0] < quantized.psnr_db < quantized.psnr_interval_db[1]
    assert quantized.psnr_worst_db < quantized.psnr_db and 4 < quantized.bits_per_weight < 6
    assert 0.5 < quantized.variation < 1.5 and 0 < quantized.frechet_of_means < quantized.frechet
    assert len(quantized.relative_l2_by_step) == STEPS
    # The trajectory is of all five pictures: it ends in the result, but for sums in batches of another size.
    assert quantized.relative_l2_by_step[-1] == pytest.approx(quantized.relative_l2, rel=1e-2)
    assert original.layer_snr_db is None and quantized.layer_snr_db.keys() == half.layer_snr_db.keys()
    assert quantized.layer_snr_db["proj_out_2"] == math.inf  # kept as it is
    up = "transformer_blocks.0.ff.net.0.proj"
    assert 15 < quantized.layer_snr_db[up] < half.layer_snr_db[up] < 70
    low, high = quantized.frechet_excess_interval
    assert low <= high and quantized.frechet_excess == pytest.approx(quantized.frechet - original.frechet)
    # The distance is symmetric: the original from other seeds, and these from the original.
    assert original.frechet == pytest.approx(other.frechet, rel=1e-6) and original.frechet > 0


def test_a_judge_that_says_the_same_of_every_picture(evaluation):
    """Its accuracy is the share of pictures of that class; its score, by the softmax of what it says, one."""
    said = torch.tensor([0.0, 3.0, -1.0, 0.5])
    judge = Judge("of one mind", JUDGE.features, 2, lambda x: said.expand(len(x), 4))
    row = Evaluation(evaluation.sampler, "small", SETTINGS, evaluation.directory, judge).row(ORIGINAL)
    labels = evaluation.request(ORIGINAL).labels
    assert len(labels) == 5 and labels.count(1) not in (0, 5)
    assert row.accuracy == labels.count(1) / 5 and row.score == pytest.approx(1)
    # One that tells two pictures from three: exp of the mean divergence from (0.4, 0.6), but for a shared rest.
    judge = Judge("of two minds", JUDGE.features, 2, lambda x: torch.log(_certainty(x)))
    row = Evaluation(evaluation.sampler, "small", SETTINGS, evaluation.directory, judge).row(ORIGINAL)
    certainty = torch.cat([_certainty(batch) for batch in evaluation.pictures(ORIGINAL)]).double()
    marginal = certainty.mean(0)
    expected = math.exp(float((certainty * (certainty / marginal).log()).sum(1).mean()))
    assert row.score - 1 == pytest.approx(expected - 1, rel=1e-2) and expected > 1.0001


def _certainty(pictures):
    """Probabilities of two classes, by a picture's brightness."""
    first = pictures.mean((1, 2, 3)).sigmoid()
    return torch.stack([first, 1 - first], 1)


def test_no_picture_that_is_compared_calibrates(tmp_path, monkeypatch):
    """Nor is one that is shown; and the classes take turns in both."""
    found, asked = Evaluation(sampler(), "small", SETTINGS, tmp_path / "samples"), []
    runs = found.sampler.runs
    monkeypatch.setattr(
        found.sampler, "runs", lambda subjects, seeds: asked.append(list(seeds)) or runs(subjects, seeds)
    )
    found.calibration(moments=False)
    seeds = {seed for of_run in asked for seed in of_run}
    assert len(seeds) == SETTINGS.calibration_pictures
    for variant in (ORIGINAL, NOISE_FLOOR[0]):
        assert not seeds & set(found.request(variant).seeds)


def test_too_few_pictures_for_a_covariance_have_no_distance(evaluation):
    many = Judge("many features", lambda x: x.flatten(1), 64, JUDGE.logits)
    few = Evaluation(evaluation.sampler, "small", SETTINGS, evaluation.directory, many)
    assert few.row(ORIGINAL).frechet is None


def test_the_original_is_left_as_it_was(evaluation):
    assert {parameter.dtype for parameter in evaluation.model.parameters()} == {torch.float32}
    again = Evaluation(sampler(), "small", SETTINGS, evaluation.directory)
    for mine, theirs in zip(again.model.parameters(), evaluation.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_pictures_that_are_not_finite_have_a_row_without_measures(evaluation, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(evaluation.directory, tmp_path / "samples")
    spoiled = Evaluation(evaluation.sampler, "small", SETTINGS, directory, JUDGE)
    path = sorted(spoiled.folder(COMPENSATED).glob("*.safetensors"))[-1]
    drawn = load_file(path)
    drawn["samples"][0, 0, 0, 0] = math.nan
    save_file(drawn, path)
    row = spoiled.row(COMPENSATED)
    assert not row.finite and (row.psnr_db, row.frechet, row.accuracy) == (None, None, None)
    assert f"{COMPENSATED.name}: its pictures hold NaN" in report.table([row], None)


def test_results_are_strict_json():
    row = Row(
        "same",
        "w8a8",
        "nearest",
        True,
        math.inf,
        (math.inf, math.inf),
        1.0,
        1.0,
        0.0,
        1.0,
        [0.0],
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        8.1,
    )
    content = json.loads(json.dumps(report.as_json([row], dict(seed=0)), allow_nan=False))
    assert content["rows"][0]["psnr_db"] is None and content["rows"][0]["psnr_interval_db"] == [None, None]
    assert "inf" in report.table([row], None) and "(inf" not in report.table([row], None)


QUICK = ("--samples", "4", "--steps", "2", "--batch", "2", "--schemes", "w8a8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "model"
    small_dit().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def evaluated(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "one"
    assert cli.main(["evaluate", str(source), "--out", str(out), "--npz", *QUICK]) == 0
    return out


def test_on_the_command_line_again_and_with_other_settings(source, evaluated, capsys):
    names = {path.name for path in evaluated.iterdir()}
    assert {"results.json", "pictures.png", "steps.png", "layers.png", "w8a8.npz", "samples"} <= names
    before = (evaluated / "results.json").read_text()
    assert cli.main(["evaluate", str(source), "--out", str(evaluated), *QUICK]) == 0
    assert (evaluated / "results.json").read_text() == before and "original, bf16" in capsys.readouterr().out
    assert cli.main(["evaluate", str(source), "--out", str(evaluated), *QUICK, "--seed", "7"]) == 2
    assert "holds samples with first_seed = 0, and 7 is asked for" in capsys.readouterr().err
    more = (*QUICK, "w8a16")  # a scheme that has no samples yet
    assert cli.main(["evaluate", str(source), "--out", str(evaluated), *more, "--seed", "7"]) == 2
    assert not (evaluated / "samples" / "w8a16").exists()


def test_two_processes_draw_the_same_pictures(source, evaluated, tmp_path):
    # Without a GPU, --multi_gpu means two processes on the CPU; --cpu would be one.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ditq_kernels"]
    command = [sys.executable, "-m", *launch, "evaluate", str(source), "--out", str(tmp_path / "two"), *QUICK]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("original, bf16") == 1
    drawn_by = set()
    for path in (tmp_path / "two" / "samples").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            drawn_by.add(file.metadata()["process"])
    assert drawn_by == {"0 of 2", "1 of 2"}
    one, two = (json.loads((out / "results.json").read_text()) for out in (evaluated, tmp_path / "two"))
    assert [row["name"] for row in one["rows"]] == [row["name"] for row in two["rows"]]
    for mine in (evaluated / "samples").rglob("*.safetensors"):
        theirs = tmp_path / "two" / mine.relative_to(evaluated)
        # Fewer threads add in another order.
        assert_close(load_file(mine)["samples"], load_file(theirs)["samples"], rtol=1e-3, atol=1e-3)


def test_latents_are_judged_by_their_pictures(tmp_path, capsys):
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ("--out", str(tmp_path / "out"), "--npz", *QUICK)
    assert cli.main(["evaluate", str(tmp_path / "pipeline"), *arguments]) == 0
    with np.load(tmp_path / "out" / "original--other-seeds.npz") as found:
        assert found["arr_0"].shape == (4, 16, 16, 3)  # latents are 4 x 8 x 8
        of_pictures = found["arr_0"].astype(float) / 255
    with np.load(tmp_path / "out" / "original.npz") as found:
        noise = ((found["arr_0"].astype(float) / 255 - of_pictures) ** 2).mean((1, 2, 3))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert rows["original, other seeds"]["psnr_db"] == pytest.approx(float((-10 * np.log10(noise)).mean()), abs=0.05)
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "pipeline" / "transformer"), *arguments]) == 2
    assert "has no autoencoder to decode them" in capsys.readouterr().err


def test_other_models_beside_the_first(source, tmp_path, capsys):
    quantized = tmp_path / "w8"
    assert cli.main(["quantize", str(source), "--scheme", "w8a8", "--out", str(quantized)]) == 0
    out = tmp_path / "out"
    assert cli.main(["evaluate", str(source), str(quantized), "--out", str(out), *QUICK]) == 0
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows[str(quantized)]["psnr_db"] == rows["w8a8"]["psnr_db"] and rows[str(quantized)]["bits_per_weight"] > 8
    # Quantized again another way: what was drawn of the former one is refused.
    assert cli.main(["quantize", str(source), "--scheme", "w4a16_g32", "--out", str(tmp_path / "w4")]) == 0
    shutil.rmtree(quantized)
    (tmp_path / "w4").rename(quantized)
    capsys.readouterr()
    assert cli.main(["evaluate", str(source), str(quantized), "--out", str(out), *QUICK]) == 2
    assert "holds samples with fingerprint = " in capsys.readouterr().err
    for name, change, message in (
        ("classes", dict(classes=4), "num_embeds_ada_norm is 4"),
        ("deep", dict(layers=2), "linear_1 is 256 to 64 there, missing here"),
        ("wide", dict(head_dim=16), "linear_1 is 256 to 32 there, 256 to 64 here"),
    ):
        small_dit(**change).save_pretrained(tmp_path / name)
        capsys.readouterr()
        assert cli.main(["evaluate", str(source), str(tmp_path / name), "--out", str(tmp_path / "bad"), *QUICK]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad" / "samples").exists()  # it is said before anything is drawn
