"""Blocks that make fewer passes draw the same, and are in everything else what they were."""

import collections
import copy
import dataclasses
import pickle

import pytest
import torch
from small_transformers import SMALL, small_transformer
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_kernels as ditq
from ditq_kernels import QuantLinear
from ditq_kernels.model import fused_blocks
from ditq_kernels.model.conversion import quantized_layers
from ditq_kernels.model.substituted_class import is_substituted

SCHEMES = ("w8a8", "w8a8_static", "w4a8_g32", "w4a8_g32_static", "w4a16_g32")
NEAR_DB = 60.0  # of an output, to the error that fusing makes
# Fused, it rounds less often. The output is small, and its errors are few: by luck their squares may be twice as large.
LUCK_DB = 3.0
# Small transformers, and how many of their blocks run fused.
KNOWN = {
    "DiT": {"BasicTransformerBlock": 2},
    "PixArt": {"BasicTransformerBlock": 2},
    "SD3": {"JointTransformerBlock": 3},
    "SD3.5 medium": {"JointTransformerBlock": 3},
    "FLUX": {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2},
    "Wan": {"WanTransformerBlock": 2},
    "Wan image to video": {"WanTransformerBlock": 2},
    "Qwen-Image": {"QwenImageTransformerBlock": 2},
}
BLOCK_NAMES = set(fused_blocks.FUSED_BLOCKS) - {"Timesteps", "RMSNorm"}


def quantized(name, scheme):
    model, inputs = small_transformer(name)
    calibration = ditq.calibrate(model, lambda: model(**inputs)) if scheme.endswith("static") else None
    return ditq.quantize(model, scheme, calibration, progress=False), inputs


@torch.no_grad()
def output(model, inputs):
    found = model(**inputs, return_dict=False)[0]
    return found if torch.is_tensor(found) else found[0]


def db(found, expected):
    return float(10 * torch.log10(expected.square().mean() / (found - expected).square().mean()))


@pytest.fixture
def runs(monkeypatch):
    """How often each fused block ran, and how often it left an input to the block's own code."""
    counted = collections.Counter()
    for name, fused in list(fused_blocks.FUSED_BLOCKS.items()):

        def forward(*args, name=name, original=fused.forward, **kwargs):
            result = original(*args, **kwargs)
            counted[name if result is not None else f"not {name}"] += 1
            return result

        monkeypatch.setitem(fused_blocks.FUSED_BLOCKS, name, dataclasses.replace(fused, forward=forward))
    return counted


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name in SMALL for scheme in (SCHEMES if name in KNOWN else ("w8a8",))]
)
def test_every_model_draws_the_same(name, scheme, runs):
    model, inputs = quantized(name, scheme)
    expected, state = output(model, inputs), model.state_dict()
    classes = [type(module) for module in model.modules()]
    assert ditq.fuse(model) is model
    found = output(model, inputs)
    assert {block: count for block, count in runs.items() if block in BLOCK_NAMES} == KNOWN.get(name, {})
    assert torch.equal(found, expected) or db(found, expected) > NEAR_DB
    if not runs:  # products alone are joined, which are exact
        assert torch.equal(found, expected)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert ditq.unfuse(model) is model
    assert torch.equal(output(model, inputs), expected)
    assert [type(module) for module in model.modules()] == classes


def test_fused_blocks_run_in_every_model_that_has_them():
    assert set().union(*KNOWN.values()) == BLOCK_NAMES


@pytest.mark.parametrize("name", ["DiT", "FLUX"])
def test_fusing_twice_and_copies(name):
    model, inputs = quantized(name, "w4a8_g32")
    ditq.fuse(ditq.fuse(model))
    expected = output(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, inputs), expected)
        fused = [is_substituted(module) for module in model.modules()]
        assert [is_substituted(module) for module in other.modules()] == fused and any(fused)
        ditq.unfuse(other)
        assert not any(is_substituted(module) for module in other.modules())
        assert [is_substituted(module) for module in model.modules()] == fused


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8_g32"])
def test_saved_fused_and_loaded_it_is_the_same(scheme, tmp_path):
    model, inputs = quantized("FLUX", scheme)
    expected = output(model, inputs)
    ditq.save(model, tmp_path / "unfused")
    ditq.save(ditq.fuse(model), tmp_path / "fused")
    sizes = [
        sorted((path.name, path.stat().st_size) for path in (tmp_path / name).iterdir())
        for name in ("unfused", "fused")
    ]
    assert sizes[0] == sizes[1]
    for name in ("unfused", "fused"):
        assert torch.equal(output(ditq.load(tmp_path / name), inputs), expected)


def test_a_switch_of_quantize_fuses():
    model, inputs = quantized("DiT", "w8a8")
    expected = output(ditq.fuse(model), inputs)
    model, inputs = small_transformer("DiT")
    ditq.quantize(model, "w8a8", fused=True, progress=False)
    assert any(is_substituted(module) for module in model.modules())
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", ["DiT", "FLUX", "Wan"])
def test_gradients_are_those_of_the_unfused_model(name):
    grads = []
    for fuses in (False, True):
        model, inputs = quantized(name, "w8a8")
        if fuses:
            ditq.fuse(model)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        grads.append({key: one.grad for key, one in model.named_parameters() if one.grad is not None})
    assert list(grads[0]) == list(grads[1]) and grads[0]
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_hooks_anywhere_are_called_as_often(runs):
    model, inputs = quantized("FLUX", "w8a8")
    counts = []
    for fuses in (False, True):
        if fuses:
            ditq.fuse(model)
        seen = collections.Counter()
        handles = [
            module.register_forward_hook(lambda *_, name=name, seen=seen: seen.update([name]))
            for name, module in model.named_modules()
        ]
        output(model, inputs)
        counts.append(seen)
        for handle in handles:
            handle.remove()
    assert counts[0] == counts[1] and not runs["FluxTransformerBlock"]
    output(model, inputs)
    assert runs["FluxTransformerBlock"] == 2


def test_an_adapter_does_its_part():
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(r=4, target_modules=["to_q", "ff.net.0.proj", "norm1.linear"], init_lora_weights=False)
    model, inputs = quantized("FLUX", "w8a8")
    without = output(model, inputs)
    torch.manual_seed(3)
    model.add_adapter(wanted)
    expected = output(model, inputs)
    assert db(expected, without) < NEAR_DB
    ditq.fuse(model)
    assert db(output(model, inputs), expected) > NEAR_DB
    model.disable_adapters()
    assert db(output(model, inputs), without) > NEAR_DB
    model.enable_adapters()
    model.delete_adapters("default")
    assert db(output(model, inputs), without) > NEAR_DB
    torch.manual_seed(3)
    model.add_adapter(wanted)  # onto a fused model
    assert db(output(model, inputs), expected) > NEAR_DB
    ditq.unfuse(model)
    assert torch.equal(output(model, inputs), expected)


def test_training_and_autocast_run_unfused(runs):
    model, inputs = quantized("DiT", "w8a8")
    ditq.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs).sample
        expected = ditq.unfuse(copy.deepcopy(model))(**inputs).sample
    assert torch.equal(found, expected) and not runs["BasicTransformerBlock"]
    model.train()
    output(model, inputs)
    assert not runs["BasicTransformerBlock"]
    model.eval()
    output(model, inputs)
    assert runs["BasicTransformerBlock"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KNOWN)
def test_in_16_bits_it_is_no_further_from_fp32(name, dtype):
    model, inputs = quantized(name, "w8a8")
    exact = output(model, inputs)
    inputs = {key: cast(value, dtype) for key, value in inputs.items()}
    torch.nn.Module.to(model, dtype)
    unfused = output(model, inputs)
    fused = output(ditq.fuse(model), inputs)
    assert fused.dtype == unfused.dtype == dtype
    assert db(fused.float(), exact) > db(unfused.float(), exact) - LUCK_DB


def cast(value, dtype):
    if isinstance(value, dict):
        return {key: one if key == "image_rotary_emb" else cast(one, dtype) for key, one in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


class Dispatched(TorchDispatchMode):
    """Counts operations that compute or copy: what would be launched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def launches(model, name):
    block, inputs = BLOCKS[name](torch.nn.Module.to(model, torch.bfloat16))
    inputs = cast(inputs, torch.bfloat16)
    with torch.no_grad():
        block(**inputs)
        with Dispatched() as dispatched:
            block(**inputs)
    return dispatched.count


def _dit_block(model):
    block = model.transformer_blocks[0]
    x, labels = torch.randn(2, 16, block.dim), torch.tensor([1, 2])
    return block, dict(hidden_states=x, timestep=torch.tensor([5, 5]), class_labels=labels)


def _flux_block(model, double=True):
    block = (model.transformer_blocks if double else model.single_transformer_blocks)[0]
    width = model.inner_dim
    x, text, temb = torch.randn(1, 9, width), torch.randn(1, 5, width), torch.randn(1, width)
    rotary = tuple(torch.randn(2, 14, block.attn.head_dim))
    return block, dict(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)


BLOCKS = {
    "DiT": _dit_block,
    "FLUX": _flux_block,
    "FLUX single": lambda model: _flux_block(model, double=False),
}


@pytest.mark.parametrize(
    ("name", "scheme", "unfused", "fused"),
    [
        ("DiT", "w8a8", 46, 21),
        ("DiT", "w4a8_g32", 46, 21),
        ("DiT", "w4a16_g32", 40, 23),
        ("FLUX", "w8a8", 106, 20),
        ("FLUX single", "w8a8", 54, 9),
    ],
)
def test_a_block_launches_less(name, scheme, unfused, fused):
    model, _ = quantized(name.removesuffix(" single"), scheme)
    assert (launches(model, name), launches(ditq.fuse(model), name)) == (unfused, fused)


@pytest.mark.parametrize("name", KNOWN)
def test_whole_models_compile_to_one_graph(name):
    model, inputs = quantized(name, "w4a8_g32")
    expected = output(ditq.fuse(model), inputs)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(**inputs, return_dict=False)[0]
    found = found if torch.is_tensor(found) else found[0]
    assert db(found, expected) > NEAR_DB


def test_what_is_not_known_stays(monkeypatch):
    model, _ = quantized("DiT", "w8a8")
    block = model.transformer_blocks[0]
    fused = fused_blocks.FUSED_BLOCKS["BasicTransformerBlock"]
    other = dataclasses.replace(fused, parameters=(*fused.parameters, "more"))  # as of another diffusers
    monkeypatch.setitem(fused_blocks.FUSED_BLOCKS, "BasicTransformerBlock", other)
    ditq.fuse(model)
    assert not is_substituted(block) and is_substituted(block.attn1)
    plain, _ = small_transformer("DiT")
    ditq.fuse(plain)
    assert not any(is_substituted(block.attn1) for block in plain.transformer_blocks)  # nothing of it is quantized
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a pipeline, got str"):
        ditq.fuse("transformer")


def test_inputs_that_a_fused_block_does_not_take(runs):
    model, inputs = quantized("Wan 2.2 5B", "w8a8")
    ditq.fuse(model)
    output(model, inputs)
    assert runs["not WanTransformerBlock"] == 2 and not runs["WanTransformerBlock"]


def test_it_takes_no_memory_that_it_did_not_take():
    model, _ = quantized("FLUX", "w4a8_g32")

    def stored():
        return sum(
            {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}.values()
        )

    before = stored(), sum(layer.nbytes for layer in quantized_layers(model).values())
    ditq.fuse(model)
    assert (stored(), sum(layer.nbytes for layer in quantized_layers(model).values())) == before
    assert all(isinstance(layer, QuantLinear) for layer in quantized_layers(model).values())
