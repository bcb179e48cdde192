"""Interrupted or killed, nothing half-written or half-quantized is taken for whole."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from small_models import dit_inputs, tiny_dit
from small_sources import digests

import ditq_kernels as ditq
from ditq_kernels.integrations.diffusers import DitqConfig
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.model.conversion import quantized_layers

# Quantizes the pipeline in sys.argv[1] to sys.argv[2] and is killed when the files of weights are written that far.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
import safetensors.torch
from ditq_kernels import cli
write, written = safetensors.torch.save_file, 0
def killed(tensors, path, *args, **kwargs):
    global written
    write(tensors, path, *args, **kwargs)
    written += 1
    if written == int(sys.argv[3]):
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = killed
for name, module in list(sys.modules.items()):
    if getattr(module, "save_file", None) is write:
        module.save_file = killed
import transformers.modeling_utils, diffusers.models.modeling_utils
for module in (transformers.modeling_utils, diffusers.models.modeling_utils):
    for name in [name for name, value in vars(module).items() if value is write]:
        setattr(module, name, killed)
cli.main(["quantize", sys.argv[1], "--scheme", "w8a8", "--out", sys.argv[2]])
"""


def test_killed_in_the_middle_it_leaves_nothing_that_loads(tmp_path):
    from small_pipelines import PIPELINES

    next(entry for entry in PIPELINES if entry.name == "pixart_sigma").build(0).save_pretrained(tmp_path / "pipe")
    before = digests(tmp_path / "pipe")
    arguments = [str(tmp_path / "pipe"), str(tmp_path / "out"), "2", str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert digests(tmp_path / "pipe") == before and not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path.name != "pipe"]
    assert len(left) == 1 and left[0].name.startswith("."), "nothing that a listing shows"
    with pytest.raises(ValueError):
        ditq.load(left[0])


class Stop:
    """Interrupts the quantizing of the ``last``-th layer."""

    def __init__(self, monkeypatch, last):
        self.last, self.seen, self.quantize = last, 0, QuantLinear.from_linear.__func__
        monkeypatch.setattr(QuantLinear, "from_linear", classmethod(self))

    def __call__(self, cls, *args, **kwargs):
        self.seen += 1
        if self.seen == self.last:
            raise KeyboardInterrupt
        return self.quantize(cls, *args, **kwargs)


def output(model):
    with torch.no_grad():
        return model(*dit_inputs()).sample


def test_interrupted_a_model_is_as_far_as_it_is_and_can_be_gone_on_with(tmp_path, monkeypatch):
    model = tiny_dit()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        Stop(patched, 5)
        ditq.quantize(model, "w8a8", progress=False)
    assert len(quantized_layers(model)) == 4
    model.save_pretrained(tmp_path / "half")
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path / "half")), output(model))
    with pytest.raises(ValueError, match=r"quantized already.*ditq\.plan\(model, 'w8a8'\) to quantize what is left"):
        ditq.quantize(model, "w8a8", progress=False)
    ditq.quantize(model, ditq.plan(model, "w8a8"), progress=False)
    assert torch.equal(output(model), output(ditq.quantize(tiny_dit(), "w8a8", progress=False)))


def test_interrupted_while_it_is_loaded_there_is_no_model(tmp_path, monkeypatch):
    tiny_dit().save_pretrained(tmp_path)
    before = digests(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        Stop(patched, 5)
        DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=DitqConfig("w8a8"))
    assert digests(tmp_path) == before
    again = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=DitqConfig("w8a8"))
    assert torch.equal(output(again), output(ditq.quantize(tiny_dit(), "w8a8", progress=False)))
