"""What is traced of a step without a GPU: counted against what a block is known to do, and a planted pass shows."""

import json

import pytest
import torch
from torch import nn

from ditq_kernels import cli, published
from ditq_kernels.inspect.bounds import GPUS
from ditq_kernels.inspect.step import report, work
from ditq_kernels.inspect.step.absent_gpu import absent_gpu, place, placed
from ditq_kernels.inspect.step.compiled import scheduled
from ditq_kernels.inspect.step.eager import dispatched
from ditq_kernels.inspect.step.tensors import memory_of, size_of
from ditq_kernels.inspect.step.trace import Form, trace
from ditq_kernels.inspect.step.work import ACTIVATION, INT8, PASS, PRODUCT, SCRATCH, WEIGHT, WIDE, Total, Work

BF16 = 2


class Block(nn.Module):
    """A norm, a modulation, a product, GELU and a product, with or without a copy that nobody needs."""

    def __init__(self, channels, copies=False):
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.copies = copies

    def forward(self, x, scale):
        y = torch.nn.functional.gelu(self.up(self.norm(x) * (1 + scale)))
        if self.copies:
            y = y.transpose(1, 2).contiguous().transpose(1, 2)
        return x + self.down(y)


def traced(copies=False, compiled=False, rows=64, channels=32):
    with torch.device("meta"):
        block = Block(channels, copies).to(torch.bfloat16).requires_grad_(False)
        inputs = dict(
            x=torch.empty(1, rows, channels, dtype=torch.bfloat16),
            scale=torch.empty(1, 1, channels, dtype=torch.bfloat16),
        )
    with absent_gpu(90) as mode:
        place(block, mode)
        inputs = placed(inputs, mode)
        if compiled:
            return scheduled(block, inputs, 90)
        return dispatched(lambda: block(**inputs), {memory_of(one) for one in block.parameters()})


def of_kind(kernels, kind):
    return [one for one in kernels if one.kind == kind]


def test_operations_are_kernels():
    rows, channels = 64, 32
    found = traced()
    assert [one.name for one in found] == ["native_layer_norm", "add", "mul", "addmm", "gelu", "addmm", "add"]
    up, down = of_kind(found, PRODUCT)
    assert up.macs == down.macs == {WIDE: rows * channels * 4 * channels}
    assert up.moved(WEIGHT) == BF16 * (channels * 4 * channels + 4 * channels)
    assert up.moved(ACTIVATION) == BF16 * rows * (channels + 4 * channels)
    gelu = found[4]
    assert gelu.touched == ((ACTIVATION, BF16 * rows * 4 * channels),) * 2 and not gelu.macs
    # The copy, and behind it a product that cannot add its bias itself.
    copied = [one.name for one in traced(copies=True)]
    assert copied == ["native_layer_norm", "add", "mul", "addmm", "gelu", "clone", "bmm", "add", "add"]


TOO_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
not_too_old = pytest.mark.skipif(TOO_OLD, reason="PyTorch 2.11 is the first that can be asked what it would compile")


@not_too_old
def test_the_compiler_is_asked_what_it_fuses():
    rows, channels = 64, 32
    found = traced(compiled=True)
    assert [one.kind for one in found] == [PASS, PRODUCT, PASS, PRODUCT, PASS]
    norm, up, gelu, _, add = found
    assert norm.moved(ACTIVATION) == BF16 * (2 * rows * channels + channels)
    assert gelu.moved(ACTIVATION) == 2 * BF16 * rows * 4 * channels
    assert add.moved(ACTIVATION) == 3 * BF16 * rows * channels
    assert (up.macs, up.touched[1:]) == (traced()[3].macs, traced()[3].touched[1:])
    assert sum(one.moved(WEIGHT) for one in found) == BF16 * (8 * channels * channels + 5 * channels)
    assert len(traced(copies=True, compiled=True)) == len(found)  # it makes GELU write what the copy would
    # PyTorch is as it was: what is compiled next is for this machine.
    assert torch.equal(torch.compile(torch.sin)(torch.ones(3)), torch.ones(3).sin())


def test_sizes():
    x = torch.empty(4, 8, device="meta")
    assert size_of(x) == 128 and size_of(x[:1].expand(4, 8)) == 32 and size_of(x[:0]) == 0


def test_bounds():
    gpu = GPUS[90]
    clocks_a_us = gpu.clock_ghz * 1e3
    assert Work("", PASS, ((ACTIVATION, 10**6),)).bound(90, gpu) == pytest.approx(10**6 / gpu.l2_bytes / clocks_a_us)
    weight = Work("", PRODUCT, ((WEIGHT, 10**7),), {INT8: 1})
    assert weight.bound(90, gpu) == pytest.approx(10**7 / gpu.memory_gbs / 1e3)
    products = [Work("", PRODUCT, (), {kind: 10**9}).bound(90, gpu) for kind in (INT8, WIDE)]
    assert products[1] == pytest.approx(2 * products[0])
    # What L2 cannot hold comes from memory.
    large = Work("", PASS, ((ACTIVATION, gpu.l2_size + 10**9),))
    assert large.bound(90, gpu) == pytest.approx(10**9 / gpu.memory_gbs / 1e3)
    total = Total.of([weight, large, Work("", PRODUCT, ((SCRATCH, 5),))], 90, gpu)
    assert (total.launches, total.passed, total.weights, total.macs) == (3, large.touched[0][1], 10**7 + 5, 1)
    assert total.times(3) == total.plus(total).plus(total)
    assert total.plus(total) != total


@pytest.mark.parametrize("name", published.MODELS)
def test_published_models(name):
    about = published.MODELS[name]
    found = trace(name, Form(), 90)
    assert set(found.blocks) == set(about.blocks())
    for blocks in found.blocks:
        block = found.block(blocks)
        assert [one for one in block if one.kind == work.ATTENTION] and len(of_kind(block, PRODUCT)) >= 4
    # Each block's weights are read once: what is left of the model's is read outside of them.
    model = about.build(3)
    read = sum(one.moved(WEIGHT) for blocks in found.blocks.values() for block in blocks for one in block)
    stored = sum(
        BF16 * one.numel() for blocks in about.depths for one in getattr(model, blocks).parameters() if one.ndim > 1
    )
    assert read == pytest.approx(stored, rel=0.02)


def test_a_block_of_dit():
    rows, samples, channels = 2048, 2, 1152
    block = trace("dit-xl-2-512", Form(), 90).block("transformer_blocks")
    tokens = 12 * channels**2 * rows
    conditions = samples * (6 * channels**2 + channels**2 + 256 * channels)
    attention = 2 * samples * 1024**2 * channels
    assert sum(sum(one.macs.values()) for one in block) == tokens + conditions + attention
    assert len(block) == 40


@not_too_old
def test_the_command(capsys, tmp_path):
    """Every form of a model, by kernels that are compiled, and what fusing is to bring."""
    out = tmp_path / "step.json"
    assert cli.main(["inspect", "--step", "dit-xl-2-2", "--scheme", "w4a8_g128", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no time is measured" in said and "bound: what the GPU's published rates allow" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| step")]
    assert [row[1] for row in rows] == [form["name"] for form in json.loads(out.read_text())["forms"]]
    record = json.loads(out.read_text())
    forms = {form["name"]: form["totals"] for form in record["forms"]}
    blocks = {name: totals["transformer_blocks"] for name, totals in forms.items()}
    eager, fused = blocks["w4a8_g128"], blocks["w4a8_g128, fused"]
    assert blocks["16 bits"]["launches"] == 40 and fused["launches"] < eager["launches"] - 15
    assert fused["passed"] < 0.5 * eager["passed"]
    assert blocks["w4a8_g128, fused, compiled"]["launches"] < blocks["w4a8_g128, compiled"]["launches"]
    macs = {totals["macs"] for totals in blocks.values()}
    assert len(macs) == 1
    kernels = [
        one for form in record["forms"] if form["name"] == "w4a8_g128" for one in form["kernels"]["transformer_blocks"]
    ]
    names = [one["name"] for one in kernels]
    assert names.count("quantize_activation_kernel") == 6 and "dense_product_kernel" in names
    assert any(role == SCRATCH for one in kernels for role, _ in one["touched"]) == ("expansion_kernel" in names)
    step, block, rest = (forms["16 bits"][part] for part in ("step", "transformer_blocks", report.REST))
    assert step["launches"] == 28 * block["launches"] + rest["launches"]


def test_what_cannot_be_traced_says_why(monkeypatch, capsys):
    assert report.attempt("no-such-model", Form(), 90) == "KeyError: 'no-such-model'"
    found = iter([(Form(), trace("dit-xl-2-256", Form(), 90)), (Form(compiled=True), "RuntimeError: shape error")])
    monkeypatch.setattr(report, "traced", lambda *_: found)
    assert cli.main(["inspect", "--step", "dit-xl-2-256"]) == 1
    said = capsys.readouterr().out
    assert "not traced: 16 bits, compiled: RuntimeError: shape error" in said and said.count("| 16 bits") == 3


@pytest.mark.skipif(not TOO_OLD, reason="this PyTorch is new enough")
def test_an_old_pytorch_is_told():
    with pytest.raises(ImportError, match=r"2\.11"):
        traced(compiled=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--step", "dalle"], "unknown model 'dalle'; --step takes dit-xl-2-256, "),
        (["--step", "dit"], "'dit' could be dit-xl-2-256 or dit-xl-2-512; --step takes dit-xl-2-256, "),
        (["--step", "dit-xl-2-256", "--scheme", "w3a8"], "unknown scheme 'w3a8'"),
        (["--step", "dit-xl-2-256", "--arch", "sm_100"], "no rates are kept of a GPU of sm_100; --arch takes sm_80"),
        (["--step", "dit-xl-2-256", "--arch", "sm_80", "sm_90"], "for one GPU at a time"),
        (["--step", "dit-xl-2-256", "--execute"], "--step traces a model, and goes with"),
        (["--step", "dit-xl-2-256", "--out", "/no/such/folder/file"], "there is no folder /no/such/folder"),
        (["--scheme", "w8a8"], "add --step MODEL"),
    ],
)
def test_mistakes_are_said(arguments, said, capsys):
    assert cli.main(["inspect", *arguments]) == 2
    assert said in capsys.readouterr().err
