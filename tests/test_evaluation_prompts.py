"""``ditq evaluate`` with a pipeline that is given prompts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pipelines import PIPELINES

import ditq_kernels as ditq
from ditq_kernels import cli
from ditq_kernels.evaluation import report
from ditq_kernels.evaluation.run import Evaluation, Settings
from ditq_kernels.evaluation.variants import NOISE_FLOOR, ORIGINAL, Variant
from ditq_kernels.integrations.samplers import Drawing, PromptSampler

SIZE = ("--height", "32", "--width", "32", "--steps", "2")
ASKED = (*SIZE, "--samples", "3", "--schemes", "w8a8", "w4a8_g32", "--rounding", "compensated")
PROMPTS = ("a red fox", "an otter")


def small(name):
    return next(entry for entry in PIPELINES if entry.name == name).build(0)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipelines") / "flux"
    small("flux").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantized(flux):
    """Another directory."""
    asked = ("--scheme", "w8a8", "--components", "transformer")
    assert cli.main(["quantize", str(flux), *asked, "--out", f"{flux}-w8a8"]) == 0
    return f"{flux}-w8a8"


@pytest.fixture(scope="module")
def evaluated(flux, quantized, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "flux"
    assert cli.main(["evaluate", str(flux), quantized, "--prompt", *PROMPTS, *ASKED, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def found(evaluated):
    return json.loads((evaluated / "results.json").read_text())


def samples(out, name):
    return torch.cat([load_file(path)["samples"] for path in sorted((out / "samples" / name).glob("*.safetensors"))])


def test_rows_and_pictures(quantized, evaluated, found):
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        *("original", "original, other seeds", "original, bf16", quantized),
        *("w8a8", "w4a8_g32 compensated"),
    ]
    assert found["about"]["prompts"] == list(PROMPTS) and found["about"]["height"] == 32
    assert rows["original"]["psnr_db"] is None
    # In bf16 FLUX rounds the time, too.
    names = ("original, other seeds", "original, bf16", "w4a8_g32 compensated", "w8a8")
    others, half, four_bits, best = (rows[name]["psnr_db"] for name in names)
    assert others < half < four_bits < best
    assert rows[names[2]]["bits_per_weight"] < rows["w8a8"]["bits_per_weight"]
    for row in list(rows.values())[1:]:
        assert len(row["relative_l2_by_step"]) == 2 and row["finite"]
    assert rows[quantized]["psnr_db"] == pytest.approx(best, abs=0.5)
    assert rows[quantized]["bits_per_weight"] == rows["w8a8"]["bits_per_weight"]
    assert rows["w8a8"]["layer_snr_db"]["transformer_blocks.0.attn.to_q"] == pytest.approx(40, abs=5)
    assert np.asarray(Image.open(evaluated / "pictures.png")).shape == (6 * 32, 3 * 32, 3)
    assert (evaluated / "steps.png").exists() and (evaluated / "layers.png").exists()


def test_a_picture_is_the_pipelines_of_its_prompt_and_seed(flux, evaluated):
    pipe = ditq.load(flux)
    ditq.quantize(pipe.transformer, "w8a8", progress=False)
    call = dict(num_inference_steps=2, height=32, width=32, output_type="pt")
    for name, one in (("original", ditq.load(flux)), ("w8a8", pipe)):
        third = one(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(2), **call).images
        torch.testing.assert_close(samples(evaluated, name)[2:], third * 2 - 1, atol=1e-4, rtol=1e-4)


def test_nothing_is_drawn_again(flux, evaluated, found, tmp_path, monkeypatch):
    monkeypatch.setattr(PromptSampler, "sample", None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked = (*SIZE, "--samples", "3", "--schemes", "--prompts", str(prompts))
    assert cli.main(["evaluate", str(flux), *asked, "--out", str(evaluated)]) == 0
    assert json.loads((evaluated / "results.json").read_text())["rows"] == found["rows"][:3]


@pytest.mark.parametrize("change", ["prompt", "order", "size", "encoder"])
def test_what_else_decides_the_pictures_is_refused(change, flux, evaluated, capsys):
    prompts = dict(prompt=("a red fox", "a seal"), order=PROMPTS[::-1]).get(change, PROMPTS)
    size = ("--width", "48") if change == "size" else ()
    encoder = flux / "text_encoder_2" / "model.safetensors"
    stored = encoder.read_bytes()
    if change == "encoder":
        weights = load_file(encoder)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, encoder, metadata={"format": "pt"})
    try:
        code = cli.main(["evaluate", str(flux), *ASKED, *size, "--prompt", *prompts, "--out", str(evaluated)])
    finally:
        encoder.write_bytes(stored)
    error = capsys.readouterr().err
    assert code == cli.EXIT_USER_ERROR and "original holds samples with fingerprint = " in error
    assert "(weights, scheduler, prompts or sizes are others); choose another directory" in error


def test_an_original_in_bf16_stays_so(flux, tmp_path):
    pipe = small("flux").to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "flux")
    asked = (*SIZE, "--samples", "1", "--schemes", "w8a8", "--prompt", "x", "--out", str(tmp_path / "out"))
    assert cli.main(["evaluate", str(tmp_path / "flux"), *asked]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["original", "original, other seeds", "w8a8"]
    call = dict(num_inference_steps=2, height=32, width=32, output_type="pt")
    drawn = ditq.load(tmp_path / "flux")(prompt="x", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(samples(tmp_path / "out", "original"), drawn.float() * 2 - 1)


def test_a_model_that_takes_lists_at_places_and_not_by_names(tmp_path):
    pipe = small("z_image")
    sampler = PromptSampler(pipe, PROMPTS, Drawing(2, height=32, width=32), progress=False)
    original = pipe.transformer
    evaluation = Evaluation(sampler, "small", Settings(1, 1, calibration_pictures=2), tmp_path)
    variants = (ORIGINAL, NOISE_FLOOR[1], Variant("w4a8_g32_static", "w4a8_g32_static", "compensated"))
    assert [evaluation.draw(variant) for variant in variants] == [1] * 3
    half, quantized = (evaluation.row(variant) for variant in variants[1:])
    assert half.psnr_db > quantized.psnr_db > 15 and min(quantized.layer_snr_db.values()) > 15
    assert len(quantized.relative_l2_by_step) == 2
    assert pipe.transformer is original and original.dtype == torch.float32


def test_a_pipeline_that_does_not_show_its_steps(tmp_path):
    pipe = small("pixart_sigma")
    sampler = PromptSampler(pipe, PROMPTS, Drawing(2), progress=False)
    assert sampler.after_steps(pipe.transformer, PROMPTS, (0, 1)) == []
    report.draw_steps([], tmp_path / "steps.png")
    assert not (tmp_path / "steps.png").exists()


REFUSED = {
    "no prompt": ((), "is sampled with prompts; give --prompt, or --prompts with a file of one a line"),
    "empty file": (("--prompts", "{empty}"), "holds no prompt; it takes one a line"),
    "scheme": (("--prompt", "x", "--schemes", "w3a8"), "unknown scheme"),
    "video": (("--prompt", "x"), "holds a WanPipeline, which draws videos, and only pictures are compared; ditq"),
    "bare": (("--prompt", "x"), "holds a FluxTransformer2DModel alone; give the pipeline that samples with it"),
    "classes": (("--prompt", "x"), "is sampled with classes, and reads no --prompt"),
    "two models": (("--prompt", "x"), "samples with transformer and unet, and only one model is exchanged for others"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_anything_is_loaded(case, flux, tmp_path, capsys, monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("weights are loaded")

    sources = {name: tmp_path / name for name in ("video", "classes", "two models")}
    for name, index in (("video", "WanPipeline"), ("classes", "DiTPipeline"), ("two models", "FluxPipeline")):
        (sources[name] / "transformer").mkdir(parents=True)
        (sources[name] / "model_index.json").write_text(
            json.dumps({"_class_name": index, "transformer": [], "unet": []})
        )
    (sources["classes"] / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (sources["two models"] / "unet").mkdir()
    sources["bare"] = flux / "transformer"
    (tmp_path / "empty").write_text("\n")
    for name in ("diffusers.DiffusionPipeline.from_pretrained", "diffusers.ModelMixin.from_pretrained"):
        monkeypatch.setattr(name, loads)
    words, message = REFUSED[case]
    words = [word.format(empty=tmp_path / "empty") for word in words]
    out = tmp_path / "out"
    assert cli.main(["evaluate", str(sources.get(case, flux)), "--out", str(out), *words]) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("ditq: error: ")]
    assert len(lines) == 1 and message in lines[0], error
    assert not out.exists()
