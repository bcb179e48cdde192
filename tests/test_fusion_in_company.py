"""What libraries and users do with models of which they do not know that they are fused."""

import copy
import gc
import weakref

import pytest
import torch
from small_transformers import small_transformer
from test_fusion import NEAR_DB, db, output, quantized
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.integrations import patches
from ditq_kernels.model import shared_projections
from ditq_kernels.model.substituted_class import is_substituted

patches.apply()


def fused(name, scheme="w8a8"):
    """(model, inputs, what the unfused one draws)."""
    model, inputs = quantized(name, scheme)
    expected = output(model, inputs)
    return ditq.fuse(model), inputs, expected


def near(found, expected):
    return torch.equal(found, expected) or db(found, expected) > NEAR_DB


def wide_dit(scheme):
    """Of several groups of inputs, so that what is stored of them is no contiguous view."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    return ditq.quantize(model.eval(), scheme, progress=False)


def attentions(model):
    return [module for module in model.modules() if shared_projections.shares(module)]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8_g32"])
def test_every_way_to_write_a_state_dict(scheme, tmp_path):
    from safetensors.torch import load_file, save_file, save_model

    model = wide_dit(scheme)
    state = {name: part.clone() for name, part in model.state_dict().items()}
    ditq.fuse(model)
    assert any(not part.is_contiguous() for part in model.parameters()) == (scheme != "w8a8")
    save_file(model.state_dict(), tmp_path / "file")
    save_model(model, tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "pickle")
    for found in (
        load_file(tmp_path / "file"),
        load_file(tmp_path / "model"),
        torch.load(tmp_path / "pickle", weights_only=True),
    ):
        assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    layer = model.transformer_blocks[0].attn1.to_q
    torch.save(layer, tmp_path / "fused layer")
    torch.save(ditq.unfuse(model).transformer_blocks[0].attn1.to_q, tmp_path / "layer")
    sizes = [(tmp_path / name).stat().st_size for name in ("fused layer", "layer")]
    assert abs(sizes[0] - sizes[1]) < 512


def test_accelerate_saves_all_of_it(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    model = ditq.fuse(wide_dit("w4a8_g32"))
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_calibrated_ranges_that_are_loaded_count():
    model, inputs = quantized("DiT", "w8a8_static")
    state = {name: part * 3 if name.endswith("input_amax") else part for name, part in model.state_dict().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    expected = output(other, inputs)
    ditq.fuse(model).load_state_dict(state)
    assert near(output(model, inputs), expected) and len(attentions(model)) == 2
    model.transformer_blocks[0].attn1.to_k.input_amax.detach().mul_(0.2)  # one of three that share an input
    other.transformer_blocks[0].attn1.to_k.input_amax.detach().mul_(0.2)
    assert near(output(model, inputs), output(other, inputs))


def test_layers_in_two_places():
    model, inputs = quantized("DiT", "w8a8")
    blocks = model.transformer_blocks
    blocks[0].attn1.to_v = blocks[0].attn1.to_k
    other = copy.deepcopy(model)
    ditq.fuse(model)
    blocks[1].attn1.to_k = blocks[0].attn1.to_q
    other.transformer_blocks[1].attn1.to_k = other.transformer_blocks[0].attn1.to_q
    assert near(output(model, inputs), output(other, inputs))
    for one in (model, other):
        for name in ("to_q", "to_k"):
            layer = getattr(one.transformer_blocks[0].attn1, name)
            layer.qweight.data.copy_(layer.qweight.flip(0))
    assert near(output(model, inputs), output(other, inputs))


def _base():
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0


class _Keeps:
    """A processor of a user's: it keeps things in the attention, looks at layers, and changes its input in place."""

    def __call__(self, attn, hidden_states, **kwargs):
        assert isinstance(attn, nn.Module) and attn.to_q.weight.dtype == torch.float32
        attn.kept = hidden_states * 1.0
        query = attn.to_q(hidden_states)
        hidden_states = hidden_states.clone()
        key = attn.to_k(hidden_states)
        hidden_states *= 2
        value = attn.to_v(hidden_states)
        return attn.to_out[0](query + key + value)


def test_processors_of_users_are_given_the_attention_and_tensors():
    model, inputs = quantized("DiT", "w8a8")
    plain = copy.deepcopy(model)
    ditq.fuse(model)
    found = []
    for one in (plain, model):
        for block in one.transformer_blocks:
            block.attn1.set_processor(_Keeps())
        found.append(output(one, inputs))
        assert one.transformer_blocks[0].attn1.kept.ndim == 3
    assert near(*found)


def test_processors_that_split_their_input():
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    model, inputs = quantized("PixArt", "w8a8")
    plain = copy.deepcopy(model)
    ditq.fuse(model)
    for one in (plain, model):
        one.transformer_blocks[0].attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    assert near(output(model, inputs), output(plain, inputs))


@pytest.mark.parametrize("name", ["DiT", "PixArt", "SD3", "FLUX", "Wan", "Qwen-Image"])
def test_hooks_on_an_attention_see_tensors(name):
    model, inputs, expected = fused(name)
    seen = []

    def look(module, args, kwargs):
        seen.append((*args, *kwargs.values())[0].mean())

    for attention in attentions(model):
        attention.register_forward_pre_hook(look, with_kwargs=True)
    assert near(output(model, inputs), expected) and len(seen) == len(attentions(model))


def test_hooks_everywhere_are_called_as_often():
    counts = []
    for fuses in (False, True):
        model, inputs = quantized("DiT", "w4a16_g32")
        if fuses:
            ditq.fuse(model)
        count = 0

        def hook(*_):
            nonlocal count
            count += 1

        handle = nn.modules.module.register_module_forward_hook(hook)
        output(model, inputs)
        handle.remove()
        model.transformer_blocks[0].norm1.silu.register_forward_hook(hook)
        output(model, inputs)
        counts.append(count)
    assert counts[0] == counts[1] > 60


def test_a_forward_that_somebody_put_into_the_class(monkeypatch):
    from diffusers.models.attention import BasicTransformerBlock

    def patched(self, hidden_states, *args, **kwargs):
        return hidden_states + 1

    model, inputs, _ = fused("DiT")
    unfused = output(copy.deepcopy(model), inputs)
    monkeypatch.setattr(BasicTransformerBlock, "forward", patched)
    found = output(model, inputs)
    assert torch.equal(found, output(ditq.unfuse(model), inputs)) and not near(found, unfused)
    ditq.fuse(model)
    assert torch.equal(output(model, inputs), found)


def test_shallow_copies_call_their_own_layers():
    model, _, _ = fused("DiT")
    attention = model.transformer_blocks[0].attn1
    other = copy.copy(attention)
    other._modules = dict(attention._modules)
    other.to_v = nn.Linear(32, 32)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        found = other(x)
        ditq.unfuse(model)
        plain = copy.copy(attention)
        plain._modules = dict(attention._modules)
        plain.to_v = other.to_v
        assert torch.equal(found, plain(x))


@pytest.mark.parametrize("name", ["FLUX", "Wan", "Qwen-Image"])
def test_caches_find_fused_blocks(name):
    hooks = pytest.importorskip("diffusers.hooks")
    model, inputs = quantized(name, "w8a8")
    plain = copy.deepcopy(model)
    ditq.fuse(model)
    for one in (plain, model):
        one.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.05))
    with plain.cache_context("x"), model.cache_context("x"):
        assert near(output(model, inputs), output(plain, inputs))


@pytest.mark.parametrize("name", ["FLUX", "SD3", "PixArt", "Wan", "Qwen-Image"])
@pytest.mark.filterwarnings("ignore:to_.* joins")
def test_diffusers_own_fused_projections_before_and_after(name):
    for order in ("before quantize", "before", "after"):
        if order == "before quantize" and name in ("FLUX", "Wan"):
            continue  # which quantizing refuses
        model, inputs = small_transformer(name)
        if order == "before quantize":
            model.fuse_qkv_projections()
        ditq.quantize(model, "w8a8", progress=False)
        if order == "before":
            model.fuse_qkv_projections()
        if order == "after":
            ditq.fuse(model)
            model.fuse_qkv_projections()
        found = output(ditq.fuse(model), inputs)
        assert near(found, output(ditq.unfuse(model), inputs)), order


@pytest.mark.parametrize("name", ["FLUX", "SD3", "Wan", "Qwen-Image"])
def test_a_modulation_of_one_for_a_batch(name):
    model, inputs, _ = fused(name)
    for key in ("timestep", "guidance", "pooled_projections"):
        if inputs.get(key) is not None:
            inputs[key] = inputs[key][:1]
    assert near(output(model, inputs), output(ditq.unfuse(model), inputs))


@pytest.mark.parametrize("name", ["FLUX", "SD3"])
def test_blocks_promote_as_they_did(name):
    model, _ = quantized(name, "w8a8")
    nn.Module.to(model, torch.bfloat16)
    block = model.transformer_blocks[0]
    width = model.inner_dim
    x, text = (torch.randn(1, tokens, width, dtype=torch.bfloat16) for tokens in (9, 5))
    temb = torch.randn(1, width)
    block.norm1.float(), block.norm1_context.float()
    with torch.no_grad():
        expected = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
        ditq.fuse(model)
        found = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_look_at_shapes_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def look(model, inputs):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            faked = {key: mode.from_tensor(one) if torch.is_tensor(one) else one for key, one in inputs.items()}
            model(**faked)

    for name in ("DiT", "FLUX"):
        model, inputs, expected = fused(name)
        try:
            look(*quantized(name, "w8a8"))
        except TypeError:
            pytest.skip("this PyTorch does not mix fake inputs with weights that are there")
        look(model, inputs)
        assert near(output(model, inputs), expected)


def test_hooks_that_outlive_fusing():
    hooks = pytest.importorskip("diffusers.hooks")
    accelerate = pytest.importorskip("accelerate")
    model, inputs, expected = fused("FLUX")
    model.enable_cache(hooks.TaylorSeerCacheConfig())
    ditq.unfuse(model)
    model.disable_cache()
    assert torch.equal(output(model, inputs), expected)
    ditq.fuse(model)
    blocks = list(model.transformer_blocks)
    for module in (*blocks, *(block.attn for block in blocks)):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert near(output(model, inputs), expected)
    ditq.unfuse(model)
    assert torch.equal(output(model, inputs), expected)
    for module in (*blocks, *(block.attn for block in blocks)):
        accelerate.hooks.remove_hook_from_module(module)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_programs_are_exported_with_the_layers_parameters(strict):
    model, inputs, expected = fused("DiT")
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=strict)
        found = program.module()(**inputs)
    assert near(found.sample, expected) and set(program.graph_signature.parameters) <= names


def test_a_traced_attention():
    model, _, _ = fused("DiT")
    attention = model.transformer_blocks[0].attn1
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        traced = torch.jit.trace(attention, x, check_trace=False)
        assert near(traced(x), attention(x))


def test_layers_of_earlier_versions():
    layer = quantized("DiT", "w8a8")[0].transformer_blocks[0].attn1.to_q
    vars(layer).pop("shared_input", None)
    layer.half()


def joined_layers(model):
    shared = [one for attention in attentions(model) for one in vars(attention)[shared_projections._SHARED]]
    return [weakref.ref(one._found[0]) for one in shared if one._found[0] is not None]


def test_what_was_joined_goes_when_its_layers_move():
    peft = pytest.importorskip("peft")
    for hides in (
        lambda model: model.add_adapter(peft.LoraConfig(target_modules=["to_q"])),
        lambda model: [attention.to_q.register_forward_hook(lambda *_: None) for attention in attentions(model)],
    ):
        model, _, _ = fused("Wan")
        alive = joined_layers(model)
        assert len(alive) == 4
        hides(model)
        model._apply(lambda part: part.clone())
        gc.collect()
        assert not any(one() for one in alive) and len(joined_layers(model)) == 2  # of keys and values for the text


def test_offloading_in_groups_calls_layers_one_by_one():
    hooks = pytest.importorskip("diffusers.hooks")
    model, _, _ = fused("FLUX")
    alive = joined_layers(model)
    hooks.apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), "leaf_level")
    gc.collect()
    assert alive and not any(one() for one in alive) and not attentions(model)
    assert not attentions(ditq.fuse(model))


def test_unfusing_leaves_nothing():
    peft = pytest.importorskip("peft")

    def storages(model):
        return sum(
            {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _stored(model)}.values()
        )

    model, _ = quantized("FLUX", "w8a8")
    before = storages(model)
    ditq.fuse(model)
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    ditq.unfuse(model)
    assert storages(model) == before and not _members(model)
    for change in (copy.deepcopy, lambda one: one.load_state_dict(one.state_dict(), assign=True) and one):
        model, _ = quantized("DiT", "w8a8")
        model = change(ditq.fuse(model))
        ditq.unfuse(model).half()
        assert not _members(model) and not any(map(is_substituted, model.modules()))
        assert len({one.untyped_storage().data_ptr() for one in _stored(model)}) == len(_stored(model))


def _stored(model):
    return [part for name, part in model.named_parameters() if "lora" not in name]


def _members(model):
    return [module for module in model.modules() if getattr(module, "shared_input", None) is not None]


def test_shared_memory_stays_shared():
    model, inputs, expected = fused("DiT")
    model.share_memory()
    assert all(part.is_shared() for part in model.parameters())
    assert near(output(model, inputs), expected)
    assert all(part.is_shared() for part in model.parameters())
