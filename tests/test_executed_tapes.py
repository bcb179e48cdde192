"""Calls of layers and passes repeated by what was recorded of them, by compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditq_kernels import QuantLinear
from ditq_kernels.layer import tape

REPOSITORY = Path(__file__).parent.parent
# Kernels are compiled to PTX, which the executor runs in place of a GPU: a process of its own, without the interpreter.
PROGRAM = """
import copy, tempfile, torch
from torch import nn
import ditq_kernels as ditq
from ditq_kernels import QuantLinear, use_backend
from ditq_kernels.inspect import execution
from ditq_kernels.inspect.bounds import GPUS
from ditq_kernels.inspect.executor import driver
from ditq_kernels.kernels import config, dispatch, expansion
from ditq_kernels.kernels.config import shared_memory
from ditq_kernels.kernels.device import Device, standing_in
from ditq_kernels.layer import backend, ops, tape

chosen = dispatch.chosen
torch.manual_seed(0)
played, play = [], tape.Tape.play
tape.Tape.play = lambda self, *args: played.append(self) or play(self, *args)

def repeats(call, make, exact=True):
    "Three calls: the last is repeated, and all give what the other backend does, or the first did."
    for turn in range(3):
        played.clear()
        inputs = make()
        with use_backend("triton"):
            found = call(*inputs)
        with use_backend("reference"):
            wanted = call(*inputs)
        assert bool(played) == (turn == 2), (turn, played)
        pairs = [(found, wanted)] if torch.is_tensor(found) else zip(found, wanted)
        for one, other in pairs:
            assert one.shape == other.shape and one.dtype == other.dtype
            assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=0.02, rtol=0.02)

arch = 90
with tempfile.TemporaryDirectory() as cache, standing_in(Device("counted", arch, GPUS[arch].multiprocessors)):
    session = driver.Session(arch, shared_memory(arch), copies_need_fence=execution.copies_need_fence())
    driver.install(session, cache)
    backend.why_unavailable = lambda name, device_type: None
    tape.DEVICES.add("cpu")
    torch.set_grad_enabled(False)
    wide = lambda *shape: (torch.randn(*shape).bfloat16(),)
    for scheme in ("w8a8", "w8a8_static", "w4a8_g128", "w8a8_g128", "w4a16_g128"):
        layer = QuantLinear.from_linear(nn.Linear(128, 96).bfloat16(), scheme, 2.0 if "static" in scheme else None)
        exact = "a8" in scheme
        repeats(layer, lambda: wide(2, 100, 128), exact)
        if scheme == "w8a8":
            # Weights that are other ones, or elsewhere, are those that are multiplied.
            other = QuantLinear.from_linear(nn.Linear(128, 96).bfloat16(), scheme)
            x, = wide(2, 100, 128)
            def both(one):
                with use_backend("triton"):
                    found = one(x)
                with use_backend("reference"):
                    assert torch.equal(found, one(x))
            both(other)
            assert played
            for name in ("qweight", "scale", "bias"):
                getattr(layer, name).data = getattr(other, name).data.clone()
            both(layer)
            layer.qweight = other.qweight
            both(layer)
            # What looks sees the op.
            played.clear()
            with torch.autograd.profiler.profile(), use_backend("triton"):
                layer(x)
            assert not played
            # What is repeated is differentiated.
            for turn in range(3):
                with torch.enable_grad(), use_backend("triton"):
                    leaf = x.clone().requires_grad_()
                    layer(leaf).sum().backward()
                assert leaf.grad is not None and leaf.grad.abs().sum() > 0
            # A layer of another width, whose stored parts are of the same shapes, says so.
            narrow = QuantLinear.from_linear(nn.Linear(200, 96).bfloat16(), "w4a16_g128")
            wide_one = QuantLinear.from_linear(nn.Linear(256, 96).bfloat16(), "w4a16_g128")
            with use_backend("triton"):
                for _ in range(3):
                    wide_one(torch.randn(4, 256).bfloat16())
                try:
                    narrow(torch.randn(4, 256).bfloat16())
                except ValueError:
                    pass
                else:
                    raise AssertionError("not said")
            # An input that is not right is said to be.
            for wrong, error in ((torch.randn(4, 64).bfloat16(), ValueError), (torch.ones(4, 128).long(), TypeError)):
                for _ in range(3):
                    try:
                        with use_backend("triton"):
                            layer(wrong)
                    except error:
                        continue
                    raise AssertionError("not said")
    # Weights that are decoded by stretches, in two dimensions and in three.
    expansion.SCRATCH_BYTES, config.SCRATCH_BYTES = 128 * 128, 128 * 128
    for scheme in ("w4a8_g128", "w4a16_g128"):
        for bias in (True, False):
            layer = QuantLinear.from_linear(nn.Linear(128, 384, bias=bias).bfloat16(), scheme)
            expanded = [one for one in config.CONFIGS["expanded"] if one.block_m][-1]
            dispatch.chosen = lambda *args, expanded=expanded: expanded
            tape.forget()
            repeats(layer, lambda: wide(2, 70, 128), "a8" in scheme)
            repeats(layer, lambda: wide(140, 128), "a8" in scheme)
    dispatch.chosen = chosen
    for scheme in ("w8a8", "w4a8_g128"):  # added to a residual, times a gate that is part of a modulation
        layer = QuantLinear.from_linear(nn.Linear(128, 96).bfloat16(), scheme)
        tape.forget()
        added = lambda x, residual, wider: layer.added_to(residual, wider[:, 96:192], x)
        repeats(added, lambda: (*wide(2, 35, 128), *wide(2, 35, 96), *wide(2, 288)))
    for scheme, route in (("w8a8", "overlapped"), ("w4a8_g128", "expanded_overlapped")):  # Gluon's descriptors
        layer = QuantLinear.from_linear(nn.Linear(128, 96).bfloat16(), scheme)
        dispatch.chosen = lambda *args, route=route: config.CONFIGS[route][-1]
        tape.forget()
        repeats(layer, lambda: wide(2, 35, 128))
    dispatch.chosen = chosen
    norms = wide(64) + wide(64)
    angles = torch.randn(27, 64), torch.randn(27, 64)
    heads = lambda x, text: ops.attention_inputs(x, norms, *angles, 2, 1e-6, text, norms)  # parts of one result
    repeats(heads, lambda: (*wide(2, 20, 384), *wide(2, 7, 384)), exact=False)
    unturned = lambda x: ops.attention_inputs(x, norms, None, None, 2, 1e-6)
    repeats(unturned, lambda: wide(2, 20, 384), exact=False)
    repeats(lambda x: ops.quantize_activation(x), lambda: wide(40, 160))
    repeats(lambda x: ops.gelu_quantize(x, None, "tanh")[1].isfinite(), lambda: wide(40, 160))
    norm = lambda x, shift, scale: ops.norm_modulate(x, shift, scale)
    repeats(norm, lambda: (*wide(2, 20, 64), *wide(2, 64), *wide(2, 64)), exact=False)
    part = lambda x, both: ops.norm_modulate(x, both[:, 64:], both[:, :64])  # parts of one tensor
    repeats(part, lambda: (*wide(2, 20, 64), *wide(2, 128)), exact=False)
    silu = QuantLinear.from_linear(nn.Linear(128, 96).bfloat16(), "w8a16")
    repeats(silu.of_silu, lambda: wide(2, 128), exact=False)
print("done")
"""


def test_executed_kernels_are_repeated():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "done", done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w4a8_g128", "w8a8_g128", "w4a16_g128"])
@pytest.mark.parametrize("shape", [(2, 1024, 1152), (3, 1152), (1, 130, 1152)])
def test_on_a_gpu(scheme, shape, monkeypatch):
    tape.forget()
    linear = torch.nn.Linear(1152, 4608).cuda().bfloat16()
    layer = QuantLinear.from_linear(linear, scheme, 4.0 if scheme.endswith("static") else None)
    for turn in range(5):
        x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            monkeypatch.setattr(tape, "DEVICES", set())
            expected = layer(x)
            monkeypatch.setattr(tape, "DEVICES", {"cuda"})
            found = layer(x)
        assert torch.equal(found, expected), turn
    assert any(type(one) is tape.Tape for one in tape._tapes.values())
