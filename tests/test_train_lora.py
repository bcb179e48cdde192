"""A LoRA over the frozen 4-bit model: the loss falls, the pictures change, the model does not, and all is stored."""

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from small_sources import digests, small_dit

from ditq_kernels.demo import train_lora
from ditq_kernels.model.conversion import quantized_layers

pytest.importorskip("peft")
SETTINGS = train_lora.Settings(steps=24, batch=10, training_pictures=10, sampling_steps=3, learning_rate=0.02, rank=4)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora") / "model"
    small_dit(classes=10, sample_size=28, head_dim=64, layers=1).save_pretrained(directory)
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(directory / "scheduler")
    return directory


@pytest.fixture(scope="module")
def result(model_directory):
    return train_lora.run(SETTINGS, model_directory)


def test_the_loss_falls_and_only_the_adapter_changes(result):
    assert len(result.losses) == SETTINGS.steps and result.last_loss < 0.8 * result.first_loss
    assert not torch.equal(result.before, result.after)
    assert result.base_unchanged and result.bytes_quantized < result.bytes_16_bits
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert result.trained == sum(result.model.get_parameter(name).numel() for name in trained)
    assert {layer.scheme.name for layer in quantized_layers(result.model).values()} == {SETTINGS.scheme}


def test_what_is_written_loads_and_draws_the_same(result, model_directory, tmp_path):
    out = tmp_path / "lora"
    record = train_lora.write(result, SETTINGS, out, model_directory)
    assert record == json.loads((out / train_lora.REPORT_FILE).read_text())
    assert record["reloaded_draws_the_same"] and record["base_unchanged"]
    assert torch.equal(train_lora.redrawn(out / train_lora.MODEL_FOLDER, SETTINGS, model_directory), result.after)
    assert {path.name for path in out.iterdir()} == {"pictures.png", "loss.png", "report.json", "model"}
    printed = train_lora.summary(record, out)
    assert "not a bit of it changed" in printed and "bit for bit" in printed
    before = digests(out)
    with pytest.raises(FileExistsError, match="choose another directory with --out"):
        train_lora.write(result, SETTINGS, out, model_directory)
    assert digests(out) == before


def test_stripes_darken_two_rows_of_four_and_leave_black():
    picture = torch.ones(1, 1, 8, 2)
    picture[..., 1] = -1
    striped = train_lora.stripes(picture)
    assert striped[0, 0, :, 0].tolist() == [1, 1, -0.5, -0.5] * 2
    assert (striped[..., 1] == -1).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scheme", "w8a8_static"], "invalid choice"),
        (["--out", "{full}"], "exists already"),
        (["--steps", "0"], "not a whole number of at least 1"),
        (["--batch", "60"], "a batch of 60 cannot be taken from 50 training pictures"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_in_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    full = [argument.format(full=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["train_lora", "--out", str(tmp_path / "new"), *full])
    with pytest.raises(SystemExit) as stop:
        train_lora.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
