"""A checkpoint gives back the same bits, in a fresh process too, and whatever is not as it was saved is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import dit_inputs, snapshot, tiny_dit, tiny_inputs, tiny_model, tiny_run, unchanged
from torch import nn

from ditq_kernels.checkpoint import manifest as manifests
from ditq_kernels.checkpoint.manifest import model_config, sha256
from ditq_kernels.checkpoint.store import CheckpointError, _save_tensors, load, save
from ditq_kernels.layer.formats import SCHEMES
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.model.calibration import calibrate
from ditq_kernels.model.conversion import quantize, quantized_layers


@pytest.fixture(scope="module")
def saved_dit(tmp_path_factory):
    """(directory, output of the model that was saved there)."""
    model = quantize(tiny_dit(), "w4a8_g32", progress=False)
    directory = tmp_path_factory.mktemp("dit") / "model"
    save(model, directory)
    with torch.no_grad():
        return directory, model(*dit_inputs()).sample


@pytest.fixture
def saved_tiny(tmp_path):
    model = quantize(tiny_model(), "w4a8_g32", progress=False)
    save(model, tmp_path / "model")
    return tmp_path / "model"


LOAD_AND_RUN = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from small_models import dit_inputs
from ditq_kernels.checkpoint.store import load
assert "diffusers" not in sys.modules
with torch.no_grad():
    torch.save(load(sys.argv[1])(*dit_inputs()).sample, sys.argv[2])
"""


def test_a_fresh_process_computes_the_same_bits(saved_dit, tmp_path):
    directory, expected = saved_dit
    arguments = [str(directory), str(tmp_path / "out.pt"), str(Path(__file__).parent)]
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *arguments], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def test_load_gives_the_model_back(saved_dit):
    directory, expected = saved_dit
    model = load(directory)
    assert type(model).__name__ == "DiTTransformer2DModel" and not any(m.training for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(*dit_inputs()).sample, expected)
    original = quantize(tiny_dit(), "w4a8_g32", progress=False)
    assert unchanged(model, snapshot(original))
    grads = {name: p.requires_grad for name, p in original.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert model_config(model) == model_config(original)


def test_load_never_makes_weights_of_quantized_layers(saved_dit, monkeypatch):
    made = []
    initialise = nn.Linear.__init__

    def watched(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    load(saved_dit[0])
    assert made and set(made) == {"meta"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_comes_back_bit_for_bit(scheme, tmp_path):
    model = tiny_model(width=128).to(torch.bfloat16)

    def run():
        x, time = tiny_inputs(width=128)
        model(x.bfloat16(), time.bfloat16())

    quantize(model, scheme, calibrate(model, run, 0), progress=False)
    save(model, tmp_path / "model")
    with torch.device("meta"):
        skeleton = tiny_model(width=128)
    loaded = load(tmp_path / "model", model=skeleton)
    assert loaded is skeleton and unchanged(loaded, snapshot(model))
    for name, layer in quantized_layers(model).items():
        other = loaded.get_submodule(name)
        assert (other.scheme, other.dtype) == (layer.scheme, layer.dtype) == (layer.scheme, torch.bfloat16)
        assert {part.dtype for part in other.parameters()} == {part.dtype for part in layer.parameters()}


def test_a_loaded_model_can_be_saved_again(saved_tiny, tmp_path):
    save(load(saved_tiny, model=tiny_model(1)), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved_tiny / "model.safetensors").read_bytes()


def test_non_persistent_buffers_and_other_dtypes_are_stored(tmp_path):
    model = quantize(tiny_model(), "w8a8", progress=False)
    model.position.copy_(torch.randn(32))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("empty", torch.empty(0, 3))
    model.embedder.to(torch.float64)
    save(model, tmp_path / "model")
    other = tiny_model(1)
    other.register_buffer("count", torch.tensor(0))
    other.register_buffer("empty", torch.ones(0, 3))
    assert unchanged(load(tmp_path / "model", model=other), snapshot(model))
    assert other.embedder.weight.dtype == torch.float64 and other.count.dtype == torch.int64
    record = json.loads((tmp_path / "model" / "ditq.json").read_text())
    assert record["non_persistent_buffers"] == ["position"]


def tie(model):
    model.head.bias = model.embedder.weight  # two names, one parameter
    model.register_buffer("part", model.position[4:8])  # a view of another's memory
    model.register_buffer("square", model.position.view(4, 8))
    model.blocks[1].to_q = model.blocks[0].to_q  # two names, one module
    return model


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model = tie(quantize(tiny_model(), "w8a8", progress=False))
    save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert "head.bias" not in stored and "blocks.1.to_q.qweight" not in stored
    other = load(tmp_path / "model", model=tie(tiny_model(1)))
    assert unchanged(other, snapshot(model))
    assert other.head.bias is other.embedder.weight
    assert other.blocks[1].to_q is other.blocks[0].to_q and isinstance(other.blocks[0].to_q, QuantLinear)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    model = quantize(tiny_model(), "w8a8", progress=False)

    def full_disk(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_is_there_and_takes_an_empty_directory(saved_tiny, tmp_path):
    model = quantize(tiny_model(1), "w8a8", progress=False)
    before = (saved_tiny / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="choose another directory, or remove it"):
        save(model, saved_tiny)
    assert (saved_tiny / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        save(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    save(model, tmp_path / "new" / "deep")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "model", "new"]
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["ditq.json", "model.safetensors"]


def test_save_refuses_models_without_quantized_layers_or_data(tmp_path):
    with pytest.raises(CheckpointError, match=r"TinyModel holds no quantized layers to save; run ditq\.quantize"):
        save(tiny_model(), tmp_path / "model")
    model = quantize(tiny_model(), "w8a8", progress=False)
    model.head.to("meta")
    with pytest.raises(CheckpointError, match=r"head\.weight is on the meta device"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def refuses(match, directory, model=None):
    model = tiny_model(1) if model is None else model
    modules, before = dict(model.named_modules()), snapshot(model)
    with pytest.raises(CheckpointError, match=match):
        load(directory, model=model)
    assert dict(model.named_modules()) == modules and unchanged(model, before)


def edit(directory, file="ditq.json", **changes):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    """Change the tensors and make the manifest agree with the new file."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    edit(directory, tensor_bytes=path.stat().st_size, tensor_sha256=sha256(path))


def test_directories_that_are_no_checkpoints(tmp_path):
    refuses(r"nowhere is not a ditq checkpoint: it is no directory", tmp_path / "nowhere")
    refuses(r"is not a ditq checkpoint: it has no ditq\.json", tmp_path)
    for directory, match in ((tmp_path, "no model is there"), (tmp_path / "nowhere", "is not a directory")):
        with pytest.raises(CheckpointError, match=match):
            load(directory)
    for text in ("{", "[]", "{}", '{"format": "other", "version": 1}'):
        (tmp_path / "ditq.json").write_text(text)
        refuses("is not a ditq checkpoint", tmp_path)
    (tmp_path / "ditq.json").write_bytes(b"\xff\xfe\x00")
    refuses("is not a ditq checkpoint", tmp_path)


def test_versions(saved_tiny):
    edit(saved_tiny, version=2)
    refuses(r"written by a newer ditq_kernels \(format 2\); upgrade", saved_tiny)
    edit(saved_tiny, version="one")
    refuses("format version 'one'", saved_tiny)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layout_version": 2}, "stored in layout int4_planar128 version 2, and this ditq_kernels reads"),
        ({"layout": "int3"}, "stored in layout int3 version 1"),
        ({"scheme": "w3a3"}, r"blocks\.0\.to_q: unknown scheme 'w3a3'"),
        ({"dtype": "int8"}, "dtype 'int8', which is no floating"),
        ({"dtype": "os"}, "dtype 'os', which is no floating"),
        ({"in_features": "many"}, "the manifest is damaged"),
        ({"in_features": 0}, "the manifest is damaged"),
        ({"out_features": -32}, "the manifest is damaged"),
        ({"in_features": 64}, r"blocks\.0\.to_q is 32 -> 32 in the model and 64 -> 32 in the checkpoint"),
        ({"bias": False}, r"holds blocks\.0\.to_q\.bias, which the model does not have"),
        ({"novelty": 1}, "is damaged"),
    ],
)
def test_layer_records(saved_tiny, change, match):
    layers = json.loads((saved_tiny / "ditq.json").read_text())["layers"]
    layers["blocks.0.to_q"] |= change
    edit(saved_tiny, layers=layers)
    refuses(match, saved_tiny)


def test_damaged_manifests(saved_tiny):
    edit(saved_tiny, tensor_bytes="many")
    refuses("damaged: tensor_bytes", saved_tiny)
    edit(saved_tiny, layers=[])
    refuses("damaged", saved_tiny)


def test_tensor_files_that_are_not_as_saved(saved_tiny):
    path = saved_tiny / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refuses(rf"model\.safetensors has {len(data) - 1} bytes where {len(data)} were saved", saved_tiny)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuses("its sha256 differs", saved_tiny)
    path.unlink()
    refuses(r"incomplete: it has no model\.safetensors", saved_tiny)
    path.write_bytes(b"x" * 100)
    edit(saved_tiny, tensor_bytes=100, tensor_sha256=sha256(path))
    refuses("cannot be read", saved_tiny)


def test_tensors_that_do_not_fit(saved_tiny):
    original = (saved_tiny / "model.safetensors").read_bytes()

    def case(match, change):
        (saved_tiny / "model.safetensors").write_bytes(original)
        edit_tensors(saved_tiny, change)
        refuses(match, saved_tiny)

    case(r"lacks head\.weight$", lambda tensors: tensors.pop("head.weight"))
    case(r"lacks blocks\.0\.up\.group_code$", lambda tensors: tensors.pop("blocks.0.up.group_code"))
    case("holds extra, which the model does not have", lambda tensors: tensors.update(extra=torch.ones(1)))
    case(r"lacks head\.bias and 1 more$", lambda tensors: (tensors.pop("head.weight"), tensors.pop("head.bias")))
    more = dict(extra=torch.ones(1), extras=torch.ones(1), others=torch.ones(1))
    case("holds extra and 2 more, which the model does not have", lambda tensors: tensors.update(more))
    case(
        r"head\.bias is \[5\] in the checkpoint and \[4\]", lambda tensors: tensors.update({"head.bias": torch.ones(5)})
    )
    doubled = {"blocks.0.up.scale": torch.ones(64, dtype=torch.float64)}
    case(r"blocks\.0\.up\.scale is F64 in the checkpoint; it must be F32", lambda tensors: tensors.update(doubled))


def test_aliases_that_point_nowhere(saved_tiny):
    edit(saved_tiny, aliases={"head.weight": "nowhere"})
    refuses("calls head.weight another name of nowhere", saved_tiny)


def test_models_that_are_filled_must_be_the_same_model(saved_tiny):
    refuses(r"blocks\.0\.modulation is 64 -> 64 in the model", saved_tiny, tiny_model(width=64))
    model = tiny_model()
    del model.blocks[1]
    refuses(r"blocks\.1\.modulation must be a plain nn\.Linear .* found nothing", saved_tiny, model)
    quantized = quantize(tiny_model(1), "w8a8", progress=False)
    refuses(r"blocks\.0\.modulation must be a plain nn\.Linear .* found a QuantLinear", saved_tiny, quantized)


@pytest.fixture(scope="module")
def older_dit(tmp_path_factory):
    """A model of diffusers as it was saved before it was left to diffusers."""
    directory = tmp_path_factory.mktemp("older") / "model"
    _save_tensors(quantize(tiny_dit(), "w4a8_g32", progress=False), directory)
    return directory


@pytest.mark.parametrize("name", ["NoSuchModel", "DiTPipeline", "os", "_hidden", "a.b", "DDIMScheduler"])
def test_only_model_classes_of_diffusers_are_built(older_dit, saved_dit, tmp_path, name):
    for directory, change in ((older_dit, {"model_class": name}), (saved_dit[0], {"_class_name": name})):
        copy = tmp_path / directory.parent.name
        shutil.copytree(directory, copy)
        edit(copy, "ditq.json" if "model_class" in change else "config.json", **change)
        with pytest.raises(CheckpointError, match=rf"no model class .*{name}"):
            load(copy)


def test_checkpoints_of_diffusers_models_from_before_still_load(older_dit, saved_dit, tmp_path):
    model = load(older_dit)
    with torch.no_grad():
        assert torch.equal(model(*dit_inputs()).sample, saved_dit[1])
    save(model, tmp_path / "now")
    assert not (tmp_path / "now" / "ditq.json").exists()
    assert unchanged(load(tmp_path / "now"), snapshot(model))


def test_one_format_on_disk(saved_dit, tmp_path):
    """What diffusers writes and what ``save`` writes are the same files, byte for byte."""
    quantize(tiny_dit(), "w4a8_g32", progress=False).save_pretrained(tmp_path)
    ours = {file.name: file.read_bytes() for file in saved_dit[0].iterdir()}
    assert ours == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(*dit_inputs()).sample, saved_dit[1])


def test_a_cuda_device_where_there_is_none(saved_dit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device="cuda" is asked for, and PyTorch finds no GPU here'):
        load(saved_dit[0], "cuda")


def test_other_models_must_be_passed(saved_tiny):
    with pytest.raises(CheckpointError, match=r"cannot say how its TinyModel is built; build a TinyModel yourself"):
        load(saved_tiny)


def test_a_tensor_that_was_not_saved_is_named(saved_tiny):
    with torch.device("meta"):
        model = tiny_model()
        model.blocks[0].table = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.table is neither parameter nor buffer"):
        load(saved_tiny, model=model)


def test_device_is_a_string_or_a_device(saved_tiny):
    for device in ("cpu", torch.device("cpu")):
        loaded = load(saved_tiny, device, tiny_model(1))
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_load_to_the_gpu(saved_tiny):
    loaded = load(saved_tiny, "cuda", tiny_model(1))
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cuda"}


def test_big_files_are_hashed_with_a_bar(saved_tiny, monkeypatch, capsys):
    path = saved_tiny / "model.safetensors"
    quiet = sha256(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(manifests, "PROGRESS_BYTES", 0)
    monkeypatch.setattr(manifests, "CHUNK", 1000)
    assert sha256(path) == quiet
    assert "hash" in capsys.readouterr().err


def test_training_goes_on_after_loading(saved_tiny):
    model = load(saved_tiny, model=tiny_model(1))
    model(*tiny_inputs()).sum().backward()
    assert model.embedder.weight.grad is not None and model.blocks[0].up.bias.grad is not None
    assert tiny_run(model)() is None
