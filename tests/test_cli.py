"""The command line as a user meets it: what it writes, what it says, and what it exits with."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from PIL import Image
from test_sampling import tiny_dit

import ditq_kernels
from ditq_kernels import cli, environment
from ditq_kernels.integrations import source as sources
from ditq_kernels.integrations.directories import PIPELINE_FILE
from ditq_kernels.integrations.sampling import sample, save_grid
from ditq_kernels.integrations.source import LABEL_FILE, load_source
from ditq_kernels.model.conversion import quantized_layers


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
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(directory)
    # save_pretrained drops the names of the classes; the pipelines on the hub have them there.
    index = directory / PIPELINE_FILE
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": labels}))
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
def test_quantize_then_generate(scheme, extra, bare_model, tmp_path, capsys):
    out = tmp_path / "quantized"
    code, printed, _ = ditq("quantize", bare_model, "--scheme", scheme, "--out", out, *QUICK, *extra, capsys=capsys)
    assert code == 0 and "bits per weight" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized"]
    arguments = ("generate", out, "--class", "thing-3", "7", "--seed", 1, 2, "--steps", 3, "--out")
    assert ditq(*arguments, tmp_path / "here.png", capsys=capsys)[0] == 0
    here = np.asarray(Image.open(tmp_path / "here.png"))
    assert here.shape == (16, 16)
    if extra:  # one scheme is enough to see that another process draws the same bits
        return
    command = [sys.executable, "-m", "ditq_kernels", *map(str, arguments), str(tmp_path / "there.png")]
    subprocess.run(command, check=True, capture_output=True)
    assert np.array_equal(here, np.asarray(Image.open(tmp_path / "there.png")))


def test_quantize_and_generate_give_what_the_library_gives(bare_model, tmp_path, capsys):
    out = tmp_path / "quantized"
    options = ("--scheme", "w4a8_g32_static", "--rounding", "compensated", "--step", "1", "--seed", "4")
    quick = ("--samples", "2", "--steps", "3", "--guidance", "1.5")
    assert ditq("quantize", bare_model, "--out", out, *options, *quick, capsys=capsys)[0] == 0
    source = load_source(bare_model)
    model, scheduler = source.transformer, source.scheduler
    labels = [(4 + i * 7919) % 10 for i in range(2)]
    calibration = ditq_kernels.calibrate(
        model,
        lambda: sample(model, scheduler, labels, [4, 5], steps=3, guidance=1.5, progress=False),
        1,
        moments=True,
    )
    ditq_kernels.quantize(model, "w4a8_g32_static", calibration, rounding="compensated", progress=False)
    expected, written = (quantized_layers(one) for one in (model, ditq_kernels.load(out)))
    nearest = quantized_layers(ditq_kernels.quantize(load_source(bare_model).transformer, "w4a8_g32", progress=False))
    assert expected.keys() == written.keys()
    for name, layer in expected.items():
        for part, tensor in layer.named_parameters():
            assert torch.equal(tensor, written[name].get_parameter(part)), f"{name}.{part}"
    assert any(not torch.equal(layer.qweight, nearest[name].qweight) for name, layer in written.items())
    arguments = ("--class", "thing-1", "2", "--seed", "8", "9", "--steps", "3", "--guidance", "1.5")
    assert ditq("generate", out, *arguments, "--out", tmp_path / "drawn.png", capsys=capsys)[0] == 0
    save_grid(sample(model, scheduler, [1, 2, 1, 2], [8, 8, 9, 9], steps=3, guidance=1.5), 2, tmp_path / "expected.png")
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert len(np.unique(np.asarray(Image.open(tmp_path / "drawn.png")))) > 10, "flat pictures: equal bits say nothing"


def test_a_pipeline_keeps_its_other_parts(pipeline, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert ditq("quantize", pipeline, "--scheme", "w8a8_static", "--out", out, *QUICK, capsys=capsys)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "scheduler", "transformer", "vae"]
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ditq"
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
    example = f"examples:\n  ditq {command[0]}" if command else "usage: ditq"
    assert example in capsys.readouterr().out


def test_help_and_env_need_no_optional_package():
    program = """
import sys
for name in ("diffusers", "matplotlib", "torchmetrics", "accelerate", "PIL"):
    sys.modules[name] = None  # importing it raises ImportError
from ditq_kernels.cli import main
assert main(["env"]) == 0
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend reference for cpu  tensors: works" in done.stdout and "usage: ditq" in done.stdout


def test_a_missing_package_comes_with_the_way_to_get_it(monkeypatch, capsys):
    for module in ("run", "report"):
        monkeypatch.delitem(sys.modules, f"ditq_kernels.demo.{module}", raising=False)
    for module in ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.image"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, error = ditq("demo", capsys=capsys)
    assert code == cli.EXIT_USER_ERROR and "torchmetrics" in error and "pip install" in error


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
    "step beyond a whole": (
        ("quantize", "{bare}", "--scheme", "w8a8_static", "--step", "1.5", "--out", "{new}"),
        "must lie in [0, 1]",
    ),
    "clip": (("quantize", "{bare}", "--scheme", "w4a8_g32", "--clip", "1.5", "--out", "{new}"), "clip"),
    "unknown device": (("generate", "{bare}", "--class", "1", "--device", "gpu"), "unknown device 'gpu'"),
    "picture is a directory": (("generate", "{bare}", "--class", "1", "--out", "{empty}"), "is a directory"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("paint",), "invalid choice: 'paint'"),
        (("quantize", "model", "--scheme", "w8a8", "--samples", "0"), "'0' is not a whole number of at least 1"),
        (("generate", "model", "--class", "0", "--steps", "-3"), "'-3' is not a whole number of at least 1"),
        (("generate", "model", "--class", "0", "--seed", "-1"), "'-1' is not a whole number from 0"),
        (("demo", "--samples-per-class", "0"), "'0' is not a whole number of at least 1"),
    ],
)
def test_impossible_arguments_are_refused_by_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_an_existing_directory_is_refused_before_anything_is_read(bare_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "load_source", lambda *args, **options: pytest.fail("loaded the model first"))
    code, _, error = ditq("quantize", bare_model, "--scheme", "w8a8", "--out", tmp_path, capsys=capsys)
    assert code == cli.EXIT_USER_ERROR and f"{tmp_path} exists already" in error


@pytest.mark.parametrize("command", ["demo", "quantize", "calibrate", "generate", "evaluate", "analyze", "bench"])
def test_an_out_that_cannot_be_written_is_refused_before_the_work(command, bare_model, tmp_path, monkeypatch, capsys):
    def refused(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    source = [] if command in ("demo", "bench") else [str(bare_model)]
    assert cli.main([command, *source, *OPTIONS.get(command, []), "--out", str(tmp_path / "out")]) == 2
    assert "out cannot be written: " in (said := capsys.readouterr().err) and "Read-only file system" in said


OPTIONS = {"quantize": ["--scheme", "w8a8"]}


def test_weights_that_are_not_finite_are_named(tmp_path, capsys):
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_k.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    code, _, error = ditq("quantize", tmp_path / "model", "--scheme", "w8a8", "--out", tmp_path / "out", capsys=capsys)
    assert code == cli.EXIT_USER_ERROR and "transformer_blocks.0.attn1.to_k" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_that_was_not_copied_whole_is_refused(bare_model, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert ditq("quantize", bare_model, "--scheme", "w8a8", "--out", out, capsys=capsys)[0] == 0
    file = out / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, error = ditq("generate", out, "--class", "0", "--out", tmp_path / "p.png", capsys=capsys)
    assert code == cli.EXIT_USER_ERROR and "could not be loaded as a DiTTransformer2DModel" in error
    assert not (tmp_path / "p.png").exists()


def test_messages_of_other_libraries_become_one_line(monkeypatch, capsys):
    def fail():
        raise OSError("first line\n  second line")

    monkeypatch.setattr(environment, "describe", fail)
    assert cli.main(["env"]) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err == "ditq: error: first line second line\n"


def test_tracebacks_appear_on_request(bare_model, monkeypatch):
    monkeypatch.setenv("DITQ_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown scheme"):
        cli.main(["quantize", str(bare_model), "--scheme", "w3a8", "--plan-only"])


@pytest.mark.parametrize("defect", [ZeroDivisionError, TypeError, KeyError, AttributeError])
def test_a_defect_is_not_dressed_up_as_the_users(defect, monkeypatch):
    def fail():
        raise defect("ours")

    monkeypatch.setattr(environment, "describe", fail)
    with pytest.raises(defect):
        cli.main(["env"])


def test_an_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "describe", interrupted)
    assert cli.main(["env"]) == cli.EXIT_INTERRUPTED


def test_an_unfinished_save_leaves_nothing(bare_model, tmp_path, monkeypatch):
    from ditq_kernels import quantize
    from ditq_kernels.integrations.quantizing import write

    source = load_source(bare_model)
    quantize(source.transformer, "w8a8", progress=False)

    def full_disk(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write(bare_model, tmp_path / "out", {"": source.transformer})
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -u -m ditq_kernels env | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("ditq_kernels") and result.stderr == "" and result.returncode == 0


def test_the_step_and_the_clip_are_those_that_are_asked_for(bare_model, tmp_path, capsys):
    """An index from the end, too, which looks like an option; and weights of ranges that are clipped."""
    found = {}
    for step in ("-1", "2", "0"):
        file = tmp_path / f"{step}.safetensors"
        code, printed, _ = ditq("calibrate", bare_model, "--step", step, "--out", file, *QUICK, capsys=capsys)
        found[step] = ditq_kernels.Calibration.load(file)
        assert code == 0 and f"step {found[step].step}" in printed
    assert [(c.step, c.steps) for c in found.values()] == [(3, 4), (2, None), (0, None)]
    assert found["-1"].amax != found["2"].amax != found["0"].amax
    weights = {}
    for scheme, clip in itertools.product(("w4a16_g32", "w4a8_g32_static"), ((), ("--clip", "0.7"))):
        out = tmp_path / f"{scheme}{len(clip)}"
        assert ditq("quantize", bare_model, "--scheme", scheme, "--out", out, *clip, *QUICK, capsys=capsys)[0] == 0
        layer = quantized_layers(ditq_kernels.load(out))["transformer_blocks.0.attn1.to_k"]
        weights[scheme, clip] = layer.dequantized_weight()
    for scheme in ("w4a16_g32", "w4a8_g32_static"):
        whole, clipped = weights[scheme, ()], weights[scheme, ("--clip", "0.7")]
        assert clipped.abs().max() < 0.8 * whole.abs().max()
