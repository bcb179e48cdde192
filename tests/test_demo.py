"""The demo in small: the real rows on the embedded model, few steps and pictures."""

import dataclasses
import json

import pytest
import torch

from ditq_kernels.demo import MODEL_DIRECTORY, fashion_mnist
from ditq_kernels.demo.classifier import FashionClassifier, accuracy, load_classifier
from ditq_kernels.demo.report import check_output, table, write_report
from ditq_kernels.demo.run import ORIGINAL, Settings, noise_floor, run_demo
from ditq_kernels.formats import RECOMMENDED

SETTINGS = Settings(classes=4, seeds=2, steps=4)


@pytest.fixture(scope="module")
def outcome():
    return run_demo(SETTINGS)


def test_every_recommended_scheme_has_a_row(outcome):
    results, calibration = outcome
    rows = {(result.scheme, result.rounding) for result in results}
    assert results[0].name == ORIGINAL and results[0].psnr_db is None
    assert {(name, "nearest") for name in RECOMMENDED} <= rows
    assert {(name, "compensated") for name in RECOMMENDED if name.startswith("w4")} <= rows
    assert (calibration.step, calibration.steps) == (2, 4)


def test_rows_hold_what_the_packed_path_gave(outcome):
    results, _ = outcome
    original = results[0]
    floor = noise_floor(original.pictures, SETTINGS)
    for result in results[2:]:
        assert result.bits_per_weight <= (4.5 if result.scheme.startswith("w4") else 8.5)
        assert result.backend == "reference" or torch.cuda.is_available()
        assert floor < result.psnr_db_worst <= result.psnr_db  # nearer to the original than another picture is
        assert result.model_bytes < original.model_bytes / 2
    quality = {result.name: result.psnr_db for result in results}
    assert quality["w8a16_g128"] > quality["w8a8"] > quality["w4a8_g128"]
    assert quality["w4a16_g128 compensated"] > quality["w4a16_g128"]


def test_the_report_is_written_whole_and_replaced(outcome, tmp_path):
    results, calibration = outcome
    out = tmp_path / "demo"
    for _ in range(2):
        write_report(results, calibration, SETTINGS, out)
        assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "samples.png"]
        assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    record = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in record["rows"]] == [result.name for result in results]
    assert record["rows"][3]["psnr_db"] == results[3].psnr_db
    assert all(result.name.split()[0] in table(results) for result in results)


def test_a_directory_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an earlier demo's output"):
        check_output(tmp_path)
    check_output(tmp_path / "new")


def test_settings_pair_each_label_with_a_seed_of_its_own():
    assert len(SETTINGS.labels) == len(set(SETTINGS.picture_seeds)) == 8
    assert dataclasses.replace(SETTINGS, seeds=1).labels == [0, 1, 2, 3]


def test_the_embedded_model_is_what_its_card_says():
    record = json.loads((MODEL_DIRECTORY / "training.json").read_text())
    assert record["steps"] == record["of"], "the embedded model's training was not finished"
    size = sum(path.stat().st_size for path in MODEL_DIRECTORY.rglob("*") if path.is_file())
    assert size <= 20e6


def test_the_classifier_is_small_and_reads_pictures():
    classifier = load_classifier()
    assert sum(p.numel() * 2 for p in classifier.parameters()) <= 1e6
    pictures = torch.zeros(3, 1, 28, 28)
    assert classifier(pictures).shape == (3, 10)
    assert classifier.features(pictures).shape == (3, FashionClassifier.FEATURES)


@pytest.mark.skipif(not fashion_mnist.DEFAULT_DIRECTORY.exists(), reason="the data set is not installed")
def test_the_classifier_has_the_accuracy_that_it_claims():
    from ditq_kernels.demo.classifier import DIRECTORY

    claimed = json.loads((DIRECTORY / "training.json").read_text())["test_accuracy"]
    measured = accuracy(load_classifier(), *fashion_mnist.load("test"))
    assert abs(measured - claimed) <= 0.001  # ten pictures of ten thousand: other machines round differently


def test_a_missing_data_set_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        fashion_mnist.load("train", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(__import__("gzip").compress(b"\x01\x02\x03\x04"))
    with pytest.raises(ValueError, match="not an IDX archive"):
        fashion_mnist.load("train", tmp_path)
