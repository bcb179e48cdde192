"""The command line as a user meets it: what it writes, what it says, and what it exits with."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from PIL import Image
from test_sampling import tiny_dit

from ditq_kernels import cli
from ditq_kernels.integrations.diffusers import LABEL_FILE, load_source


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "bare"
    tiny_dit().save_pretrained(directory)
    DDIMScheduler(clip_sample=False).save_pretrained(directory / "scheduler")
    (directory / LABEL_FILE).write_text(json.dumps([f"thing-{i}" for i in range(10)]))
    return directory


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "pipeline"
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=8)
    transformer = tiny_dit(in_channels=4, out_channels=8)
    labels = {i: f"animal {i}, beast {i}" for i in range(10)}
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), id2label=labels).save_pretrained(directory)
    return directory


def ditq(*arguments, capsys):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


QUICK = ("--steps", 4, "--samples", 2)


@pytest.mark.parametrize(
    ("scheme", "extra"),
    [
        ("w8a8", ()),
        ("w8a8_static", ("--step", "1")),
        ("w4a8_g64", ("--rounding", "compensated")),
        ("w4a16_g32", ("--clip", "search")),
    ],
)
def test_quantize_then_generate_in_a_fresh_process_gives_the_same_bits(scheme, extra, bare_model, tmp_path, capsys):
    out = tmp_path / "quantized"
    code, printed, _ = ditq("quantize", bare_model, "--scheme", scheme, "--out", out, *QUICK, *extra, capsys=capsys)
    assert code == 0 and "bits per weight" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized"]
    arguments = ("generate", out, "--class", "thing-3", "7", "--seed", 1, 2, "--steps", 3, "--out")
    assert ditq(*arguments, tmp_path / "here.png", capsys=capsys)[0] == 0
    command = [sys.executable, "-m", "ditq_kernels", *map(str, arguments), str(tmp_path / "there.png")]
    subprocess.run(command, check=True, capture_output=True)
    here, there = (np.asarray(Image.open(tmp_path / name)) for name in ("here.png", "there.png"))
    assert here.shape == (16, 16) and np.array_equal(here, there)


def test_a_pipeline_keeps_its_other_parts(pipeline, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert ditq("quantize", pipeline, "--scheme", "w8a8_static", "--out", out, *QUICK, capsys=capsys)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "scheduler", "transformer", "vae"]
    assert not list((out / "transformer").glob("diffusion_pytorch_model*"))
    code, _, error = ditq(
        "generate", out, "--class", "beast 3", "--steps", 2, "--out", tmp_path / "p.png", capsys=capsys
    )
    assert code == 0, error
    assert np.asarray(Image.open(tmp_path / "p.png")).shape == (8, 8, 3)


def test_plan_only_writes_nothing(bare_model, tmp_path, capsys):
    code, printed, _ = ditq("quantize", bare_model, "--scheme", "w4a8_g32", "--plan-only", capsys=capsys)
    assert code == 0 and "attention product" in printed and "final layer" in printed


def test_env_says_what_works_and_why_not(capsys):
    code, printed, _ = ditq("env", capsys=capsys)
    assert code == 0
    assert "backend reference for cpu  tensors: works" in printed
    assert "backend cuda      for cpu  tensors: no: " in printed
    assert torch.__version__ in printed


@pytest.mark.parametrize("command", [(), ("quantize",), ("generate",), ("demo",), ("env",)])
def test_help_shows_examples_and_needs_no_heavy_import(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "ditq" in capsys.readouterr().out


USER_ERRORS = {
    "unknown scheme": (("quantize", "{bare}", "--scheme", "w2a2", "--out", "{new}"), "unknown scheme 'w2a2'"),
    "existing output": (
        ("quantize", "{bare}", "--scheme", "w8a8", "--out", "{bare}"),
        "exists already; choose another",
    ),
    "no output": (("quantize", "{bare}", "--scheme", "w8a8"), "--out is needed"),
    "no such source": (("quantize", "{new}", "--scheme", "w8a8", "--out", "{new}-2"), "is not a directory"),
    "empty source": (("quantize", "{empty}", "--scheme", "w8a8", "--out", "{new}"), "no model is there"),
    "step beyond": (
        ("quantize", "{bare}", "--scheme", "w8a8_static", "--step", "9", "--steps", "4", "--out", "{new}"),
        "beyond the run",
    ),
    "unknown class": (("generate", "{bare}", "--class", "dragon", "--out", "{new}.png"), "unknown class 'dragon'"),
    "class too large": (("generate", "{bare}", "--class", "10", "--out", "{new}.png"), "classes are 0 to 9"),
    "latents": (("generate", "{latent}", "--class", "1", "--out", "{new}.png"), "no autoencoder to decode them"),
    "no gpu": (("generate", "{bare}", "--class", "1", "--device", "cuda", "--out", "{new}.png"), "no CUDA GPU"),
    "foreign demo output": (("demo", "--out", "{bare}"), "not an earlier demo's output"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_user_errors_are_one_sentence_and_lose_nothing(case, bare_model, pipeline, tmp_path, capsys):
    arguments, message = USER_ERRORS[case]
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "empty").mkdir()
    latent = pipeline / "transformer"
    places = dict(bare=bare_model, new=tmp_path / "new", empty=tmp_path / "empty", latent=latent)
    before = sorted(bare_model.rglob("*"))
    code, _, error = ditq(*(argument.format(**places) for argument in arguments), capsys=capsys)
    assert code == cli.EXIT_USER_ERROR
    lines = [line for line in error.splitlines() if line.startswith("ditq: error: ")]
    assert len(lines) == 1 and message in lines[0], error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"] and sorted(bare_model.rglob("*")) == before


def test_defects_of_ours_are_not_hidden(monkeypatch, capsys):
    monkeypatch.setattr(cli, "env_command", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_an_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "env_command", interrupted)
    assert cli.main(["env"]) == cli.EXIT_INTERRUPTED


def test_an_unfinished_save_leaves_nothing(bare_model, tmp_path, monkeypatch):
    from ditq_kernels import checkpoint, quantize
    from ditq_kernels.integrations.diffusers import save_quantized

    source = load_source(bare_model)
    quantize(source.transformer, "w8a8", progress=False)

    def full_disk(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_quantized(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
