"""The main job: its rows, what their numbers mean, what the report shows, and what ships with the package."""

import functools
import gzip
import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from oracle import assert_product
from PIL import Image
from small_sources import digests, small_dit
from torch import nn

import ditq_kernels as ditq
from ditq_kernels import cli
from ditq_kernels.demo import MODEL_DIRECTORY, classifier, fashion_mnist, report, run, train_classifier
from ditq_kernels.integrations.sampling import sample
from ditq_kernels.layer.backend import selected_backend
from ditq_kernels.layer.formats import RECOMMENDED
from ditq_kernels.model.calibration import DEFAULT_PICTURES
from ditq_kernels.model.conversion import quantized_layers

SETTINGS = run.Settings(classes=2, seeds=2, steps=2)
FOUR_BITS = [name for name in RECOMMENDED if name.startswith("w4")]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A model of random weights with the shape of the embedded one's pictures; groups of 128 fit into it."""
    directory = tmp_path_factory.mktemp("demo") / "model"
    small_dit(classes=10, sample_size=28, head_dim=64, layers=1).save_pretrained(directory)
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(directory / "scheduler")
    return directory


@pytest.fixture(scope="module")
def outcome(model_directory):
    return run.run_demo(SETTINGS, model_directory)


# --- rows and numbers


def test_every_recommended_scheme_has_a_row_and_4_bits_a_compensated_one_too(outcome):
    results, _ = outcome
    assert [result.name for result in results[:2]] == ["original", "original, bf16"]
    assert [result.scheme for result in results if result.rounding == "nearest"] == list(RECOMMENDED)
    assert [result.scheme for result in results if result.rounding == "compensated"] == FOUR_BITS
    assert len({result.name for result in results}) == len(results) == 2 + len(RECOMMENDED) + len(FOUR_BITS)


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_where_it_is_emulated(emulated, model_directory, monkeypatch):
    steps = []
    original = run.sample

    def counted(*args, **kwargs):
        steps.append(kwargs["steps"])
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "sample", counted)
    monkeypatch.setattr(run.bf16, "is_emulated", lambda device: emulated)
    source = run.load_source(model_directory)
    settings = run.Settings(classes=2, seeds=1, steps=5)
    model, _, seconds = run.run_variant(run.rows()[1], source, None, settings)
    assert steps == ([run.EMULATED_STEPS, 5] if emulated else [5]) and seconds > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert run.stored_bytes(model) == run.stored_bytes(source.transformer) / 2
    layer = nn.Linear(300, 40).to(torch.bfloat16)
    x = torch.randn(9, 300, dtype=torch.bfloat16)
    with torch.no_grad():
        found = run.bf16.rounding(nn.Sequential(layer))(x)
        assert found.dtype == torch.bfloat16
        assert_product(found, x, layer.weight, layer.bias)


def test_the_first_row_is_the_model_itself(outcome, model_directory):
    source = run.load_source(model_directory)
    labels, seeds = [0, 1, 0, 1], [0, 1, 2, 3]
    expected = sample(source.transformer, source.scheduler, labels, seeds, steps=2, guidance=2.0, progress=False)
    first = outcome[0][0]
    assert torch.equal(first.pictures, (expected / 2 + 0.5).clamp(0, 1))
    assert first.psnr_db is None and first.bits_per_weight is None and first.quantized_bytes is None


def test_a_quantized_row_is_what_quantize_gives(outcome, model_directory):
    results, calibration = outcome
    row = next(result for result in results if result.name == "w4a8_g128_static compensated")
    source = run.load_source(model_directory)
    model = ditq.quantize(
        source.transformer, row.scheme, calibration, rounding="compensated", fused=True, progress=False
    )
    samples = sample(model, source.scheduler, [0, 1, 0, 1], [0, 1, 2, 3], steps=2, guidance=2.0, progress=False)
    assert torch.equal(row.pictures, run.to_unit_range(samples))
    layers = quantized_layers(model).values()
    assert row.quantized_bytes == sum(layer.nbytes for layer in layers)
    assert row.bits_per_weight == 8 * row.quantized_bytes / sum(
        layer.in_features * layer.out_features for layer in layers
    )
    held = [*model.parameters(), *model.buffers()]
    assert row.model_bytes == sum(tensor.nbytes for tensor in held)
    assert row.backend == selected_backend("cpu")


def test_the_rows_compare_with_the_first(outcome):
    first, *others = outcome[0]
    for row in others:
        squared = (row.pictures - first.pictures).double().square().flatten(1).mean(1)
        each = [-10 * math.log10(error) for error in squared]
        assert row.psnr_db == pytest.approx(sum(each) / len(each), rel=1e-4), row.name
        assert row.psnr_db_worst == pytest.approx(min(each), rel=1e-4), row.name
        assert row.ssim < 1 and row.relative_l2 > 0 and row.seconds_per_step > 0


def test_more_bits_are_nearer_to_the_original(outcome):
    quality = {result.name: result.psnr_db for result in outcome[0]}
    assert quality["w8a16_g128"] > quality["w8a8"] > quality["w4a8_g128"]
    assert quality["w8a8"] > quality["w8a8_static"]
    stored = {result.scheme: result.bits_per_weight for result in outcome[0] if result.scheme}
    assert all(bits <= (4.5 if scheme.startswith("w4") else 8.5) for scheme, bits in stored.items())


def test_calibration_saw_steps_of_other_pictures(outcome):
    _, calibration = outcome
    assert (calibration.step, calibration.moment_steps, calibration.steps) == (1, (1, 0), 2)
    assert calibration.moments
    picture_tokens = 2 * 2 * DEFAULT_PICTURES * (28 // 4) ** 2  # two steps, and guidance doubles the batch
    assert calibration.tokens["transformer_blocks.0.attn1.to_q"] == picture_tokens


def test_psnr_and_l2_of_a_known_difference():
    original = torch.linspace(-0.5, 0.5, 2 * 28 * 28).view(2, 1, 28, 28)
    moved = original.clone()
    moved[0] += 0.2  # 0.1 in [0, 1]: 20 dB
    moved[1] += 0.02
    numbers = run._compare(moved, original)
    assert numbers["psnr_db"] == pytest.approx(30, abs=1e-3)
    assert numbers["psnr_db_worst"] == pytest.approx(20, abs=1e-3)
    assert numbers["relative_l2"] == pytest.approx(float((moved - original).norm() / original.norm()))


def test_the_noise_floor_compares_seeds_of_one_class():
    settings = run.Settings(classes=2, seeds=2)
    levels = torch.tensor([0.0, 0.5, 0.1, 0.51])  # class 0, class 1, class 0, class 1
    pictures = levels.view(4, 1, 1, 1).expand(4, 1, 28, 28)
    assert run.noise_floor(pictures, settings) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert run.noise_floor(pictures[:2], run.Settings(classes=2, seeds=1)) is None


def test_each_picture_has_a_seed_of_its_own():
    settings = run.Settings(classes=3, seeds=2)
    assert settings.labels == [0, 1, 2, 0, 1, 2]
    assert len(set(settings.picture_seeds)) == 6


# --- the report


def test_the_report_holds_every_row(outcome, tmp_path):
    results, calibration = outcome
    out = tmp_path / "below" / "demo"
    report.write_report(results, calibration, SETTINGS, out)
    assert digests(out).keys() == {"samples.png", "small.png", "report.md", "report.json"}
    assert [entry.name for entry in out.parent.iterdir()] == ["demo"]
    record = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in record["rows"]] == [result.name for result in results]
    for row, result in zip(record["rows"], results, strict=True):
        assert row == {name: value for name, value in vars(result).items() if name != "pictures"}
    assert record["settings"] == dict(classes=2, seeds=2, steps=2, guidance=2.0, device="cpu")
    assert record["calibration"] == dict(step=1, steps=2, moment_steps=[1, 0])
    assert record["environment"]["torch"] == torch.__version__
    page = (out / "report.md").read_text()
    assert (
        report.table(results) in page
        and "of 2 steps ranges from 1, moments from 1 and 0" in page
        and {"cpu": "kernels for CPUs", "reference": "PyTorch's own"}[results[-1].backend] in page
    )
    assert len(report.table(results).splitlines()) == 2 + len(results)


def test_speed_is_that_of_bf16_over_the_rows(outcome):
    results = [run.Result(**vars(result)) for result in outcome[0]]
    for result in results:
        result.seconds_per_step = 0.5 if result.name == "w8a8" else 2.0 if result.name == "original, bf16" else 4.0
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in report.table(results).splitlines())
    speed = {row[1]: row[header.index("speed to bf16")] for row in rows}
    assert (speed["w8a8"], speed["original, bf16"], speed["original"]) == ("4.00", "1.00", "0.50")
    alone = report.table([result for result in results if result.name != "original, bf16"])
    assert "4.00" not in alone and "w8a8" in alone


def test_the_grid_shows_pictures_and_what_they_differ_by(outcome, tmp_path):
    results, _ = outcome
    flat = [
        run.Result(**{**vars(result), "pictures": torch.full((4, 1, 28, 28), 0.0)})
        for result in (results[0], results[5])
    ]
    # By row: class 0, class 1, and the same of another seed, which is not shown. The second row differs by a fifth of
    # what the scale reaches, down and up.
    apart = 0.2 / report.AMPLIFIED
    levels = torch.tensor([[0.2, 0.6, 0.4, 0.8], [0.2 - apart, 0.6 + apart, 0.5, 0.9]])
    for row, values in zip(flat, levels, strict=True):
        row.pictures += values.view(4, 1, 1, 1)
    report.draw_grid(flat, SETTINGS, tmp_path / "grid.png")
    shown = np.array(Image.open(tmp_path / "grid.png").convert("RGB")).astype(float) / 255

    def centre(*colour):
        places = np.argwhere(np.abs(shown - np.array(colour)).max(-1) < 0.004)
        return places.mean(0) if len(places) > 100 else None

    grey = [[centre(*[round(255 * value) / 255] * 3) for value in row[:2].tolist()] for row in levels]
    assert all(place is not None for row in grey for place in row)
    assert all(row[0][1] < row[1][1] for row in grey), "classes from left to right"
    assert all(above[0] < below[0] for above, below in zip(*grey, strict=True))
    assert centre(0.4, 0.4, 0.4) is None and centre(0.8, 0.8, 0.8) is None
    scale = matplotlib.colormaps["RdBu_r"]
    less, more = (centre(*scale(int(256 * (0.5 + sign * 0.1)))[:3]) for sign in (-1, 1))
    assert less is not None and more is not None and grey[1][1][1] < less[1] < more[1]
    assert abs(less[0] - grey[1][0][0]) < 3 and abs(more[0] - grey[1][0][0]) < 3, "in the second row"


def test_the_grid_shows_as_many_classes_as_asked_for(outcome, tmp_path):
    report.draw_grid(outcome[0][:2], SETTINGS, tmp_path / "one.png", classes=1)
    report.draw_grid(outcome[0][:2], SETTINGS, tmp_path / "all.png")
    one, every = (Image.open(tmp_path / f"{name}.png").size for name in ("one", "all"))
    assert one[0] < every[0] and one[1] == every[1]


def test_an_earlier_report_is_replaced(outcome, tmp_path):
    results, calibration = outcome
    report.write_report(results, calibration, SETTINGS, tmp_path / "demo")
    report.write_report(results[:3], calibration, SETTINGS, tmp_path / "demo")
    assert len(json.loads((tmp_path / "demo" / "report.json").read_text())["rows"]) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_a_failure_keeps_the_earlier_report(outcome, tmp_path, monkeypatch):
    results, calibration = outcome
    report.write_report(results, calibration, SETTINGS, tmp_path / "demo")
    before = digests(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report, "draw_grid", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(results, calibration, SETTINGS, tmp_path / "demo")
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        {"thesis.txt": "mine"},
        {"report.json": '{"rows": [], "tool": "another"}'},
        {"report.json": "no JSON"},
        {"report.json": json.dumps({"made_by": report.MADE_BY}), "thesis.txt": "mine"},
        {"samples.png": "mine"},
    ],
)
def test_what_is_not_the_demos_is_never_replaced(outcome, tmp_path, content):
    results, calibration = outcome
    out = tmp_path / "demo"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    before = digests(tmp_path)
    with pytest.raises(FileExistsError, match="not an earlier demo's output"):
        report.write_report(results, calibration, SETTINGS, out)
    assert digests(tmp_path) == before


def test_an_empty_directory_is_taken(outcome, tmp_path):
    report.write_report(*outcome, SETTINGS, tmp_path)
    assert (tmp_path / "report.json").exists()


def test_the_command_runs_the_main_job(model_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_demo", functools.partial(run.run_demo, model_directory=model_directory))
    out = tmp_path / "demo"
    options = ("--out", str(out), "--steps", "2", "--samples-per-class", "1", "--device", "cpu")
    assert cli.main(["demo", *options]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RECOMMENDED) and str(out / "samples.png") in printed
    record = json.loads((out / "report.json").read_text())
    assert record["settings"] == dict(classes=10, seeds=1, steps=2, guidance=2.0, device="cpu")
    assert record["other_seed_psnr_db"] is None  # there is no second seed


# --- what ships


def test_the_embedded_models_training_was_finished():
    record = json.loads((MODEL_DIRECTORY / "training.json").read_text())
    assert record["steps"] == record["of"]


def test_the_embedded_files_are_small():
    assert sum(path.stat().st_size for path in MODEL_DIRECTORY.rglob("*")) <= 20e6
    assert sum(path.stat().st_size for path in classifier.DIRECTORY.rglob("*")) <= 1e6


def test_the_embedded_model_draws_its_classes_quantized_too():
    source = run.load_source(MODEL_DIRECTORY)
    source.transformer.float()
    labels = list(range(10))
    judge = classifier.load_classifier()
    original = sample(source.transformer, source.scheduler, labels, labels, steps=8, progress=False)
    model = ditq.quantize(source.transformer, "w4a8_g128", progress=False)
    quantized = sample(model, source.scheduler, labels, labels, steps=8, progress=False)
    assert classifier.accuracy(judge, original, torch.tensor(labels)) >= 0.8
    assert classifier.accuracy(judge, quantized, torch.tensor(labels)) >= 0.8
    distance = run._compare(quantized, original)
    few = labels[:3]
    other_seeds = sample(
        source.transformer, source.scheduler, few, [seed + 10 for seed in few], steps=8, progress=False
    )
    # Nearer to the original than another picture of the class is, and yet not the original again.
    assert run._compare(other_seeds, quantized[:3])["psnr_db"] + 10 < distance["psnr_db_worst"] < 60
    assert distance["psnr_db"] > 32


def test_the_classifier_is_as_accurate_as_its_record_says():
    if not fashion_mnist.DEFAULT_DIRECTORY.is_dir():
        pytest.skip(f"the data set is not in {fashion_mnist.DEFAULT_DIRECTORY}")
    stated = json.loads((classifier.DIRECTORY / "training.json").read_text())["test_accuracy"]
    assert stated >= 0.92
    measured = classifier.accuracy(classifier.load_classifier(), *fashion_mnist.load("test"))
    assert abs(measured - stated) <= 0.001  # ten pictures of ten thousand: other machines round differently


def test_a_missing_or_foreign_data_set_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        fashion_mnist.load("train", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x01\x02\x03\x04"))
    with pytest.raises(ValueError, match="not an IDX archive"):
        fashion_mnist.load("train", tmp_path)


def test_the_classifiers_head_stands_on_its_features():
    judge = classifier.load_classifier()
    pictures = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    features = judge.features(pictures)
    assert features.shape == (3, judge.FEATURES)
    assert torch.equal(judge.head(features), judge(pictures))


def test_accuracy_counts_over_batches():
    class Fixed(torch.nn.Module):
        def forward(self, pictures):
            return torch.nn.functional.one_hot(pictures[:, 0, 0, 0].long(), 10)

    labels = torch.arange(1200) % 10
    pictures = labels.clone()
    pictures[:300] = (pictures[:300] + 1) % 10
    assert classifier.accuracy(Fixed(), pictures.float().view(-1, 1, 1, 1), labels) == 0.75


def test_augmentation_moves_and_mirrors_each_picture_by_itself():
    shift = train_classifier.SHIFT
    pictures = torch.full((400, 1, 28, 28), -1.0)
    pictures[:, :, 10, 5] = torch.arange(400).view(-1, 1) / 400
    moved = train_classifier.augment(pictures, torch.Generator().manual_seed(0))
    assert moved.shape == pictures.shape
    places = set()
    for index, picture in enumerate(moved[:, 0]):
        ((row, column),) = (picture > -1).nonzero().tolist()
        assert picture[row, column] == pictures[index, 0, 10, 5]
        places.add((row, column))
    offsets = range(-shift, shift + 1)
    assert places == {(10 + down, side + right) for down in offsets for side in (5, 22) for right in offsets}


def test_training_writes_a_classifier_that_loads(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 10
    pictures = 0.1 * torch.randn(48, 1, 28, 28, generator=generator) + labels.view(-1, 1, 1, 1) / 5 - 1
    monkeypatch.setattr(fashion_mnist, "load", lambda split, directory: (pictures, labels))
    monkeypatch.setattr(train_classifier, "BATCH", 16)
    reached = train_classifier.train(tmp_path, None, epochs=2, seed=3)
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["test_accuracy"], record["epochs"], record["seed"]) == (reached, 2, 3)
    loaded = classifier.load_classifier(tmp_path)
    assert not loaded.training
    assert classifier.accuracy(loaded, pictures, labels) == reached
    first = digests(tmp_path)["model.safetensors"]
    train_classifier.train(tmp_path, None, epochs=2, seed=3)
    assert digests(tmp_path)["model.safetensors"] == first, "the seed does not fix the training"
