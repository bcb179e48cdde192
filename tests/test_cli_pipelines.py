"""The command line with pipelines that are given prompts, and what it refuses before it loads anything."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import PIPELINES
from small_pipelines.entry import in_own_memory

import ditq_kernels as ditq
from ditq_kernels import cli
from ditq_kernels.model.calibration import Calibration
from ditq_kernels.model.conversion import quantized_layers

SMALL = ("--steps", "2", "--height", "32", "--width", "32")
CALIBRATING = (*SMALL, "--samples", "2", "--prompts")


def saved(name, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipelines") / name
    next(entry for entry in PIPELINES if entry.name == name).build(0).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return saved("flux", tmp_path_factory)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return saved("wan", tmp_path_factory)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\n\nan otter\n")
    return tmp_path / "prompts.txt"


def run(*arguments, capsys):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantized_and_drawn(flux, tmp_path, capsys):
    out = tmp_path / "quantized"
    code, printed, error = run("quantize", flux, "--scheme", "w4a8_g32", "--out", out, capsys=capsys)
    assert code == 0, error
    assert "transformer: FluxTransformer2DModel, w4a8_g32" in printed and "text_encoder_2: T5EncoderModel" in printed
    expected = ditq.quantize(ditq.load(flux), "w4a8_g32", progress=False)
    found = ditq.load(out)
    for name, one in expected.components.items():
        if isinstance(one, torch.nn.Module):
            states = one.state_dict(), found.components[name].state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    picture = tmp_path / "p.png"
    words = ("--prompt", "a red fox", "an otter", "--seed", "1", "2")
    assert run("generate", out, *words, *SMALL, "--out", picture, capsys=capsys)[0] == 0
    shown = np.asarray(Image.open(picture))
    assert shown.shape == (64, 64, 3)
    call = dict(num_inference_steps=2, height=32, width=32, output_type="np")
    alone = found(prompt="an otter", generator=torch.Generator().manual_seed(2), **call).images[0]
    assert np.abs(shown[32:, 32:] - alone * 255).max() < 1


def test_static_and_compensated_from_prompts_or_a_stored_calibration(flux, prompts, tmp_path, capsys):
    stored = tmp_path / "calibration.safetensors"
    code, printed, error = run("calibrate", flux, *CALIBRATING, prompts, "--moments", "--out", stored, capsys=capsys)
    assert code == 0 and "layers of FluxTransformer2DModel, steps 1, 0" in printed, error
    options = ("--scheme", "w4a8_g32_static", "--rounding", "compensated", "--components", "transformer")
    given = ("quantize", flux, *options, "--calibration", stored, "--out", tmp_path / "given")
    assert run(*given, capsys=capsys)[0] == 0
    own = ("quantize", flux, *options, *CALIBRATING, prompts, "--out", tmp_path / "own")
    assert run(*own, capsys=capsys)[0] == 0
    states = [ditq.load(tmp_path / name).transformer.state_dict() for name in ("given", "own")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert "transformer_blocks.0.attn.to_q.input_amax" in states[0]
    pipe = in_own_memory(ditq.load(flux))
    call = dict(num_inference_steps=2, height=32, width=32, output_type="latent")
    calibrations = [
        ditq.calibrate(
            pipe.transformer,
            lambda p=prompt, s=seed: pipe(prompt=p, generator=torch.Generator().manual_seed(s), **call),
            0.6,
        )
        for seed, prompt in enumerate(("a red fox", "an otter"))
    ]
    assert Calibration.load(stored).amax == pytest.approx(Calibration.merged(calibrations).amax, rel=1e-4)


def test_videos(wan, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert run("quantize", wan, "--scheme", "w8a8", "--out", out, capsys=capsys)[0] == 0
    size = ("--steps", "2", "--height", "16", "--width", "16", "--frames", "5")
    picture = tmp_path / "p.png"
    code, printed, error = run("generate", out, "--prompt", "a", "b", *size, "--out", picture, capsys=capsys)
    assert code == 0 and "2 videos, a row of frames each" in printed, error
    assert np.asarray(Image.open(picture)).shape == (32, 80, 3)


def test_plan_only_loads_no_weights(flux, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    code, printed, error = run("quantize", flux, "--scheme", "w8a8", "--plan-only", capsys=capsys)
    assert code == 0 and "joint attention product over image tokens" in printed and "encoder" in printed, error


REFUSED = {
    "no prompt": (("generate", "{flux}"), "is sampled with prompts; give --prompt"),
    "class": (("generate", "{flux}", "--prompt", "x", "--class", "3"), "is sampled with prompts, and knows no --class"),
    "no words": (("quantize", "{flux}", "--scheme", "w8a8_static", "--out", "{new}"), "give --prompt"),
    "bare": (
        ("generate", "{flux}/transformer", "--prompt", "x"),
        "holds a FluxTransformer2DModel alone; give the pipeline",
    ),
    "vae": (("quantize", "{flux}/vae", "--scheme", "w8a8", "--out", "{new}"), "of the AutoencoderKL in"),
    "component": (
        ("quantize", "{flux}", "--scheme", "w8a8", "--components", "unet", "--out", "{new}"),
        "has no model 'unet'; it has",
    ),
    "empty file": (("generate", "{flux}", "--prompts", "{empty}"), "holds no prompt"),
    "no file": (("generate", "{flux}", "--prompts", "{new}"), "No such file"),
    "into itself": (("quantize", "{flux}", "--scheme", "w8a8", "--out", "{flux}/new"), "would stand inside"),
    "calibrated": (("calibrate", "{flux}", "--prompt", "x", "--out", "{empty}"), "exists already"),
    "quantized": (("quantize", "{other}", "--scheme", "w8a8", "--out", "{new}"), "is quantized already, by torchao"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_anything_is_loaded(case, flux, tmp_path, capsys, monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("weights are loaded")

    for name in ("diffusers.DiffusionPipeline.from_pretrained", "diffusers.ModelMixin.from_pretrained"):
        monkeypatch.setattr(name, loads)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "other").mkdir()
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    places = dict(flux=flux, new=tmp_path / "new", empty=tmp_path / "empty", other=tmp_path / "other")
    arguments, message = REFUSED[case]
    code, _, error = run(*(argument.format(**places) for argument in arguments), capsys=capsys)
    assert code == cli.EXIT_USER_ERROR
    lines = [line for line in error.splitlines() if line.startswith("ditq: error: ")]
    assert len(lines) == 1 and message in lines[0], error
    assert not (tmp_path / "new").exists() and not (flux / "new").exists()


def test_what_a_pipeline_cannot_draw_is_one_sentence(flux, capsys):
    code, _, error = run("generate", flux, "--prompt", "x", "--steps", "2", "--frames", "3", capsys=capsys)
    assert code == cli.EXIT_USER_ERROR and "FluxPipeline could not draw with num_frames = 3" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "x"), "'x' is no step: an index"),
        (("--clip", "x"), "'x' is neither a ratio"),
        (("--guidance", "x"), "'x' is not a number"),
        (("--guidance", "nan"), "'nan' is not a number"),
    ],
)
def test_arguments_that_are_none_are_said_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", "somewhere", "--scheme", "w8a8", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "invalid" not in error


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"ditq_kernels {ditq.__version__}\n"


def test_every_denoiser_of_several_is_quantized(wan):
    """Wan 2.2 has two, one for early steps and one for late ones."""
    from ditq_kernels.integrations.quantizing import model_directories

    assert set(model_directories(wan)) == {"transformer", "text_encoder"}
    pipe = ditq.load(wan)
    pipe.register_modules(transformer_2=ditq.load(wan).transformer)
    ditq.quantize(pipe, "w8a8", progress=False)
    assert quantized_layers(pipe.transformer).keys() == quantized_layers(pipe.transformer_2).keys() != set()
