"""What ``ditq`` reads and writes: diffusers directories whole and damaged, the hub, and what stands beside a model."""

import json
import os
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub.errors import EntryNotFoundError
from small_sources import digests, small_dit, small_pipeline

import ditq_kernels as ditq
from ditq_kernels.integrations import source as sources
from ditq_kernels.integrations.quantizing import write
from ditq_kernels.integrations.source import Source, load_source
from ditq_kernels.model.conversion import quantized_layers

MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # as diffusers calls them


@pytest.fixture
def bare(tmp_path) -> Path:
    """A bare model's directory with a scheduler and the names of its classes."""
    directory = tmp_path / "model"
    small_dit().save_pretrained(directory)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(directory / "scheduler")
    (directory / sources.LABEL_FILE).write_text(json.dumps(["cat", "dog", "fish"]))
    return directory


@pytest.fixture
def pipeline(tmp_path) -> Path:
    directory = tmp_path / "model"
    small_pipeline().save_pretrained(directory)
    index = directory / sources.PIPELINE_FILE
    # save_pretrained drops the names; the pipelines on the hub have them there.
    names = {str(label): f"class {label}, number {label}" for label in range(1000)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    return directory


def write_quantized(directory: Path, out: Path) -> None:
    """``out`` from the model or pipeline in ``directory``."""
    source = load_source(directory)
    ditq.quantize(source.transformer, "w8a8", progress=False)
    write(directory, out, {"transformer" if source.is_pipeline else "": source.transformer})


def test_a_bare_model_comes_with_its_scheduler_and_class_names(bare):
    source = load_source(bare)
    assert (source.path, source.is_pipeline, source.vae) == (bare, False, None)
    assert source.labels == {"cat": 0, "dog": 1, "fish": 2}
    assert source.scheduler.config.prediction_type == "v_prediction"
    assert not source.transformer.training
    for name, tensor in small_dit().state_dict().items():
        assert torch.equal(tensor, source.transformer.state_dict()[name]), name


def test_a_pipeline_gives_up_its_autoencoder_only_on_request(pipeline):
    source = load_source(pipeline)
    assert source.is_pipeline and source.vae is None
    assert (source.labels["class 7"], source.labels["number 8"]) == (7, 8)
    assert load_source(pipeline, with_vae=True).vae.config.latent_channels == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_the_dtype_in_which_they_are_stored(tmp_path, dtype):
    model = small_dit().to(dtype)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    model.float().save_pretrained(tmp_path / "whole", variant="other")  # beside it, and not what is loaded
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "shards"):
        loaded = load_source(tmp_path / name).transformer
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_everything_beside_a_pipelines_weights_is_kept(pipeline, tmp_path):
    before = digests(pipeline)
    write_quantized(pipeline, tmp_path / "out")
    after = digests(tmp_path / "out")
    model_files = {name for name in after if name.startswith("transformer/")}
    assert model_files == {f"transformer/{name}" for name in MODEL_FILES}
    beside = {name: value for name, value in before.items() if not name.startswith("transformer/")}
    assert {name: value for name, value in after.items() if name not in model_files} == beside
    assert digests(pipeline) == before
    reread = load_source(tmp_path / "out", with_vae=True)
    assert quantized_layers(reread.transformer) and reread.is_pipeline and reread.vae is not None


def test_everything_beside_a_bare_models_weights_is_kept(bare, tmp_path):
    before = digests(bare)
    write_quantized(bare, tmp_path / "out")
    after = digests(tmp_path / "out")
    beside = ("scheduler/scheduler_config.json", sources.LABEL_FILE)
    assert after.keys() == {*MODEL_FILES, *beside}
    assert all(after[name] == before[name] for name in beside)
    assert load_source(tmp_path / "out").labels == {"cat": 0, "dog": 1, "fish": 2}


@pytest.mark.parametrize("kind", ["bare", "pipeline"])
def test_a_failure_at_the_last_moment_leaves_nothing(kind, request, tmp_path, monkeypatch):
    directory = request.getfixturevalue(kind)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_quantized(directory, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_nothing_that_exists_is_written_over(bare, tmp_path):
    before = digests(tmp_path)
    with pytest.raises(FileExistsError, match="exists already; choose another"):
        write_quantized(bare, bare)
    assert digests(tmp_path) == before


def test_a_pipeline_is_not_copied_into_itself(pipeline):
    before = digests(pipeline)
    with pytest.raises(ValueError, match="would stand inside"):
        write_quantized(pipeline, pipeline / "vae" / "quantized")
    assert digests(pipeline) == before


def test_latents_without_an_autoencoder_are_no_picture():
    with pytest.raises(ValueError, match=r"latents of 4 channels.*pipeline directory"):
        Source(Path("somewhere"), small_dit(channels=4)).decode(torch.zeros(1, 4, 8, 8))


def test_from_the_hub_comes_what_the_index_names(bare, tmp_path, monkeypatch):
    """A pipeline by diffusers' own choice of files, a bare model without other libraries' files."""
    asked = []

    def has_file(name, file):
        if not (Path(here[name]) / file).exists():
            raise EntryNotFoundError("404")

    def download(name, **options):
        asked.append((name, options))
        return here[name]

    small_pipeline().save_pretrained(tmp_path / "pipe")
    here = {"someone/bare": str(bare), "someone/pipe": str(tmp_path / "pipe")}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", has_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert load_source("someone/pipe").is_pipeline and not load_source("someone/bare").is_pipeline
    assert asked == [("someone/pipe", {}), ("someone/bare", {"allow_patterns": ["*.json", "*.safetensors"]})]


def test_the_hub_is_asked_for_names_and_not_for_paths(monkeypatch):
    asked = []

    def refuse(name, *_):
        asked.append(name)
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError) as caught:
        load_source("someone/some-dit")
    expected = "someone/some-dit is not a directory here, and the hub did not give it: no route to the hub"
    assert str(caught.value) == expected
    for path in ("./some-dit", "/nowhere/some-dit", "some-dit", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is not a directory with a model or pipeline"):
            load_source(path)
    assert asked == ["someone/some-dit"]


def _truncate_weights(directory: Path) -> None:
    os.truncate(directory / "diffusion_pytorch_model.safetensors", 5000)


def _drop_weights(directory: Path) -> None:
    (directory / "diffusion_pytorch_model.safetensors").unlink()


def _pickled_weights(directory: Path) -> None:
    _drop_weights(directory)
    torch.save(small_dit().state_dict(), directory / "diffusion_pytorch_model.bin")


def _garble_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def _list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def _foreign_class(directory: Path) -> None:
    (directory / "config.json").write_text('{"_class_name": "os.system"}')


def _text_for_a_number(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_layers": "six"}))


def _foreign_scheduler(directory: Path) -> None:
    (directory / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DiTPipeline"}')


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate_weights, "could not be loaded as a DiTTransformer2DModel"),
        (_drop_weights, "could not be loaded as a DiTTransformer2DModel"),
        (_pickled_weights, "could not be loaded as a DiTTransformer2DModel"),
        (_garble_config, "config.json cannot be read as JSON"),
        (_list_config, "config.json holds a JSON list where a dict belongs"),
        (_foreign_class, "names no model class of diffusers"),
        (_text_for_a_number, "could not be loaded as a DiTTransformer2DModel"),
        (_foreign_scheduler, "names no scheduler class of diffusers"),
        (_no_config, "no model is there"),
    ],
)
def test_damage_is_named_with_its_place(bare, damage, message):
    damage(bare)
    with pytest.raises(ValueError) as caught:
        load_source(bare)
    assert message in str(caught.value) and str(bare) in str(caught.value)
