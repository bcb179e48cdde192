"""What a user does with a pipeline of diffusers, done with quantized ones of every architecture in the table."""

import copy
import subprocess
import sys
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict
from small_pipelines import PIPELINES
from small_transformers import small_transformer
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.layer.linear import RequantizationWarning
from ditq_kernels.model.conversion import quantized_layers, replace_module
from ditq_kernels.model.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")
entries = pytest.mark.parametrize("entry", PIPELINES, ids=lambda entry: entry.name)
adaptable = pytest.mark.parametrize("entry", [e for e in PIPELINES if e.adapters], ids=lambda entry: entry.name)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CPU = torch.device("cpu")
MULTIHEAD = {"hunyuan_dit"}  # nn.MultiheadAttention reads weights of a layer that hooks never see called


def quantized(entry, scheme="w4a8_g32", components=None):
    return ditq.quantize(entry.build(0), scheme, components=components, progress=False)


def stored(model):
    return [part.clone() for layer in quantized_layers(model).values() for part in layer.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one, other):
    return float((one - other).norm() / other.norm())


DRAW = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import ditq_kernels.integrations.diffusers
from diffusers import DiffusionPipeline
from small_pipelines import PIPELINES
from small_pipelines.entry import in_own_memory
for entry in PIPELINES:
    pipe = in_own_memory(DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{entry.name}"))
    torch.save(entry.draw(pipe), f"{sys.argv[1]}/{entry.name}.pt")
"""


@pytest.fixture(scope="module")
def drawn_elsewhere(tmp_path_factory):
    """By name, what each pipeline draws here, and in a fresh process that diffusers loads it in."""
    directory = tmp_path_factory.mktemp("pipelines")
    here = {}
    for entry in PIPELINES:
        pipe = quantized(entry)
        here[entry.name] = entry.draw(pipe)
        pipe.save_pretrained(directory / entry.name)
    arguments = [str(directory), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", DRAW, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (picture, torch.load(directory / f"{name}.pt")) for name, picture in here.items()}


@entries
def test_saved_and_loaded_by_diffusers_it_draws_the_same_bits(entry, drawn_elsewhere):
    here, there = drawn_elsewhere[entry.name]
    assert torch.equal(here, there) and here.isfinite().all()
    assert distance(here, entry.draw(entry.build(0))) > 1e-3, "quantizing changes nothing: nothing was quantized"


@entries
def test_each_quantized_layer_shows_in_what_is_predicted(entry):
    """Which is all that the picture has of the transformer; one call of it takes a part of the time of a picture."""
    pipe = quantized(entry, components="transformer")
    model, calls = pipe.transformer, []
    hook = model.register_forward_pre_hook(lambda _, *asked: calls.append(asked), with_kwargs=True)
    entry.draw(pipe, 1, latent=True)
    hook.remove()

    @torch.no_grad()
    def predicted():
        args, kwargs = calls[-1]
        said = model(*args, **kwargs)[0]
        return torch.stack(said) if isinstance(said, list) else said  # some say it picture by picture

    before = predicted()
    for name, layer in quantized_layers(model).items():
        codes = layer.qweight.data.clone()
        layer.qweight.data.copy_(codes.flip(0))
        changed = distance(predicted(), before)
        layer.qweight.data.copy_(codes)
        assert (changed > 1e-4) == (name not in entry.unseen), (name, changed)
    assert torch.equal(predicted(), before)


def save_adapter(pipe, directory, seed=5, **options):
    """One over all attention layers, as diffusers saves it."""
    model = copy.deepcopy(pipe.transformer)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False, **options), adapter_name="x")
    pipe.save_lora_weights(directory, transformer_lora_layers=get_peft_model_state_dict(model, adapter_name="x"))


def decoded(model):
    """``model`` with plain layers of the weights that its quantized ones stand for."""
    for layer in quantized_layers(model).values():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = layer.dequantized_weight()
        plain.bias = layer.bias
        replace_module(model, layer, plain)
    return model


@adaptable
@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
def test_an_adapter_is_loaded_fused_and_taken_out(entry, tmp_path):
    pipe = entry.build(0)
    save_adapter(pipe, tmp_path)
    ditq.quantize(pipe, "w4a16_g32", components="transformer", progress=False)
    plain = entry.build(0)
    decoded(ditq.quantize(plain.transformer, "w4a16_g32", progress=False))
    without = entry.draw(pipe, 1, latent=True)
    for one in (pipe, plain):
        one.load_lora_weights(tmp_path, adapter_name="x")
    beside = entry.draw(pipe, 1, latent=True)
    assert distance(beside, entry.draw(plain, 1, latent=True)) < 1e-4
    effect = distance(beside, without)
    assert effect > 1e-3, "the adapter says nothing"
    pipe.set_adapters(["x"], [0.5])
    plain.set_adapters(["x"], [0.5])
    half = entry.draw(pipe, 1, latent=True)
    assert distance(half, entry.draw(plain, 1, latent=True)) < 1e-4 and distance(half, beside) > effect / 10
    pipe.set_adapters(["x"], [1.0])
    bits = stored(pipe.transformer)
    with pytest.warns(RequantizationWarning):
        pipe.fuse_lora(components=["transformer"])
    assert not equal(stored(pipe.transformer), bits)
    pipe.unfuse_lora(components=["transformer"])
    assert equal(stored(pipe.transformer), bits)
    assert distance(entry.draw(pipe, 1, latent=True), beside) < 1e-4
    pipe.unload_lora_weights()
    assert distance(entry.draw(pipe, 1, latent=True), without) < 1e-4


@pytest.mark.parametrize("entry", [e for e in PIPELINES if e.name in ("flux", "wan")], ids=lambda entry: entry.name)
def test_several_adapters_are_mixed_and_swapped(entry, tmp_path):
    """Each step draws what a plain pipeline of the decoded weights draws."""
    pipe, plain = entry.build(0), entry.build(0)
    for seed in (5, 6):
        save_adapter(pipe, tmp_path / str(seed), seed)
    save_adapter(pipe, tmp_path / "dora", 7, use_dora=True)
    ditq.quantize(pipe, "w4a16_g32", components="transformer", progress=False)
    decoded(ditq.quantize(plain.transformer, "w4a16_g32", progress=False))
    steps = [
        lambda pipe: pipe.load_lora_weights(tmp_path / "5", adapter_name="one"),
        lambda pipe: pipe.load_lora_weights(tmp_path / "6", adapter_name="other"),
        lambda pipe: pipe.set_adapters(["one", "other"], [0.7, 0.4]),
        lambda pipe: pipe.delete_adapters("one"),
        lambda pipe: pipe.load_lora_weights(tmp_path / "5", adapter_name="other", hotswap=True),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: (pipe.unload_lora_weights(), pipe.load_lora_weights(tmp_path / "dora", adapter_name="dora")),
    ]
    before = entry.draw(pipe, 1, latent=True)
    for step in steps:
        step(pipe), step(plain)
        drawn = entry.draw(pipe, 1, latent=True)
        assert distance(drawn, entry.draw(plain, 1, latent=True)) < 1e-4
        assert distance(drawn, before) > 1e-4, "a step that changes nothing says nothing"
        before = drawn


GUIDED_BY_A_SECOND_CALL = {"wan", "qwen_image", "lumina2"}


@pytest.mark.parametrize("name", ["flux", "stable_diffusion_3", *sorted(GUIDED_BY_A_SECOND_CALL)])
def test_calibration_sees_all_calls_of_a_step(name):
    entry = next(entry for entry in PIPELINES if entry.name == name)
    pipe = entry.build(0)
    calibration = ditq.calibrate(pipe.transformer, lambda: entry.draw(pipe, 3, latent=True), 0.5)
    assert (calibration.step, calibration.steps) == (1, 3)
    assert calibration.calls_per_step == (2 if name in GUIDED_BY_A_SECOND_CALL else 1)


def by_group(model):
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def by_block(model):
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def sequentially(model):
    accelerate.cpu_offload(model, CPU)


@entries
@pytest.mark.parametrize("offload", [by_group, by_block, sequentially], ids=lambda way: way.__name__)
def test_offloaded_it_draws_the_same(entry, offload):
    if offload is sequentially and entry.name in MULTIHEAD:
        pytest.skip("diffusers excludes this model from sequential offloading")
    pipe = quantized(entry, components="transformer")
    before = entry.draw(pipe, 1, latent=True)
    offload(pipe.transformer)
    if offload is sequentially:
        assert all(layer.qweight.is_meta for layer in quantized_layers(pipe.transformer).values())
    assert torch.equal(entry.draw(pipe, 1, latent=True), before)


@entries
def test_layerwise_casting_leaves_what_is_stored(entry):
    pipe = quantized(entry, components="transformer")
    before, bits = entry.draw(pipe, 1, latent=True), stored(pipe.transformer)
    exact = [part.dtype for part in bits if not part.is_floating_point()]
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert distance(entry.draw(pipe, 1, latent=True), before) < 0.2  # biases and norms are rounded to bf16
    for layer in quantized_layers(pipe.transformer).values():
        assert layer.scale.dtype == torch.float32 and layer.qweight.dtype == torch.uint8
    assert [part.dtype for part in stored(pipe.transformer) if not part.is_floating_point()] == exact


# Graphs that the blocks of the plain model take, compiled with whole graphs; None is added by quantizing.
GRAPHS = {
    **{name: 1 for name in ("wan", "ltx")},
    **{name: 2 for name in ("dit", "pixart_sigma", "stable_diffusion_3", "flux2", "sana", "chroma")},
    **{name: 2 for name in ("hunyuan_dit", "aura_flow", "cogvideox", "mochi")},
    **{name: 3 for name in ("flux", "qwen_image", "z_image", "lumina2")},
    "hunyuan_video": 5,
}


def graphs_of(pipe, entry):
    """How many the compiled blocks of ``pipe`` take, whose picture is as before."""
    expected = entry.draw(pipe, 1, latent=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(entry.draw(pipe, 1, latent=True), expected)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@entries
def test_its_blocks_compile_whole_and_once(entry):
    pipe = quantized(entry, components="transformer")
    graphs = graphs_of(pipe, entry)
    assert graphs == GRAPHS[entry.name]
    entry.draw(pipe, 3, latent=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "another number of steps compiles again"


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_plain_models_take_as_many_graphs(name):
    entry = next(entry for entry in PIPELINES if entry.name == name)
    assert graphs_of(entry.build(0), entry) == GRAPHS[name]


@pytest.mark.parametrize(("name", "other"), [("flux", "FluxImg2ImgPipeline"), ("wan", "WanVideoToVideoPipeline")])
def test_another_pipeline_made_from_it_shares_its_layers(name, other):
    """``from_pipe`` casts what both share, as it does for plain models; codes and scales stay."""
    entry = next(entry for entry in PIPELINES if entry.name == name)
    pipe = quantized(entry)
    pipe.to(torch.bfloat16)
    kept = [part for part in stored(pipe.transformer) if part.dtype != torch.bfloat16]
    made = getattr(diffusers, other).from_pipe(pipe)
    assert made.transformer is pipe.transformer
    dtypes = {layer.dtype for layer in quantized_layers(pipe.transformer).values()}
    assert dtypes == {next(p.dtype for p in pipe.vae.parameters())} == {torch.float32}
    names = ("qweight", "scale", "group_code")
    layers = quantized_layers(pipe.transformer).values()
    after = [getattr(layer, part) for layer in layers for part in names if getattr(layer, part) is not None]
    assert equal(after, kept)
    assert entry.draw(pipe, 1, latent=True).isfinite().all()


def test_the_one_recipe_without_a_small_pipeline_compiles_too():
    """Cosmos' pipelines do not come without a package that guards them."""
    drawn = {type(entry.build(0).transformer).__name__ for entry in PIPELINES}
    assert set(RECIPES) - drawn == {"CosmosTransformer3DModel"}
    model, inputs = small_transformer("Cosmos")
    ditq.quantize(model, "w8a8", progress=False)
    with torch.no_grad():
        expected = model(**inputs).sample
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.equal(model(**inputs).sample, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
