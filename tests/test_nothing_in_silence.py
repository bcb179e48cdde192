"""What once gave a wrong picture, lost weights or was asked for in vain, without a word."""

import copy
import json
import warnings

import diffusers
import peft
import pytest
import torch
from peft import LoraConfig
from small_pipelines import PIPELINES
from test_every_pipeline import distance, save_adapter
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.integrations.diffusers import DitqConfig
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.model.conversion import quantized_layers, replace_module

pytestmark = pytest.mark.usefixtures("one_thread")
ENTRIES = {entry.name: entry for entry in PIPELINES}
FLUX = ENTRIES["flux"]
LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def quantized(scheme="w8a16_g32", components="transformer"):
    return ditq.quantize(FLUX.build(0), scheme, components=components, progress=False)


def draw(pipe):
    return FLUX.draw(pipe, 1, latent=True)


def saved(pipe, directory, how=None):
    """What is loaded of ``pipe``, which is saved by ``how`` or ``ditq.save``."""
    (how or ditq.save)(pipe, directory)
    return ditq.load(directory)


def adapted(**options):
    pipe = quantized()
    torch.manual_seed(3)
    pipe.transformer.add_adapter(copy.deepcopy(LORA), adapter_name=options.pop("name", "a"))
    return pipe


def by_diffusers(pipe, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(directory)


def test_a_transformer_that_peft_has_wrapped_is_not_left_out(tmp_path):
    pipe = quantized()
    bare = pipe.transformer
    torch.manual_seed(3)
    pipe.transformer = peft.get_peft_model(bare, copy.deepcopy(LORA))
    loaded = saved(pipe, tmp_path / "x")
    assert isinstance(pipe.transformer, peft.PeftModel)
    pipe.transformer = bare  # whose layers are adapted
    assert distance(draw(loaded), draw(pipe)) < 1e-5


def test_layers_that_were_quantized_one_by_one_or_in_a_part_are_stored_as_such(tmp_path):
    by_hand, part = FLUX.build(0), FLUX.build(0)
    for layer in [m for m in by_hand.transformer.transformer_blocks.modules() if type(m) is nn.Linear]:
        replace_module(by_hand.transformer, layer, QuantLinear.from_linear(layer, "w8a16_g32"))
    ditq.quantize(part.transformer.transformer_blocks, "w8a16_g32", progress=False)
    for name, pipe in (("hand", by_hand), ("part", part)):
        for how in (ditq.save, by_diffusers):
            loaded = saved(pipe, tmp_path / f"{name} {how.__name__}", how)
            assert quantized_layers(loaded.transformer).keys() == quantized_layers(pipe.transformer).keys()
            assert distance(draw(loaded), draw(pipe)) < 1e-5
    qwen = ENTRIES["qwen_image"].build(0)
    ditq.quantize(qwen.text_encoder.model.language_model, "w4a16_g32", progress=False)
    qwen.save_pretrained(tmp_path / "qwen")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "qwen")
    states = [pipe.text_encoder.state_dict() for pipe in (qwen, again)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_what_other_libraries_note_in_the_configuration_stays():
    model = FLUX.build(0).transformer
    model.config.in_channels = 99  # as loading a control adapter does
    held = model.config
    ditq.quantize(model, "w8a8", progress=False)
    assert model.config is held and model.config.in_channels == 99


def test_adapters_come_back_as_they_were(tmp_path):
    pipe = adapted(name="org/style")
    torch.manual_seed(4)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False), "b")
    first, *others = [m for m in pipe.transformer.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in others:  # not all layers have the same
        layer.set_adapter(["org/style", "b"])
    first.set_adapter(["b"])
    assert distance(draw(saved(pipe, tmp_path / "mixed")), draw(pipe)) < 1e-5
    with pytest.warns(ditq.layer.linear.RequantizationWarning):
        pipe.fuse_lora(adapter_names=["b"], components=["transformer"])
    assert distance(draw(saved(pipe, tmp_path / "merged")), draw(pipe)) < 1e-5
    pipe = adapted()
    with_it = draw(pipe)
    pipe.disable_lora()
    assert distance(draw(pipe), with_it) > 1e-3
    assert distance(draw(saved(pipe, tmp_path / "disabled")), draw(pipe)) < 1e-5


@pytest.mark.parametrize("kind", ["IA3Config", "OFTConfig", "LoHaConfig"])
def test_adapters_of_other_kinds(kind, tmp_path):
    options = {"feedforward_modules": ["to_v"]} if kind == "IA3Config" else {}
    model = quantized().transformer
    peft.inject_adapter_in_model(getattr(peft, kind)(target_modules=["to_q", "to_v"], **options), model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "base_layer" not in name:
                parameter.normal_(std=0.1)
    pipe = FLUX.build(0)
    pipe.transformer = model
    assert distance(draw(saved(pipe, tmp_path / "x")), draw(pipe)) < 1e-5


def test_adapters_that_cannot_be_put_back_are_refused(tmp_path):
    model = peft.get_peft_model(quantized().transformer, peft.VeraConfig(target_modules=["to_q"], r=4))
    with pytest.raises(ditq.UnsupportedError, match="default is a VERA adapter"):
        ditq.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_copies_of_whole_modules_are_refused(tmp_path):
    pipe = quantized()
    config = LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["x_embedder"])
    model = peft.get_peft_model(pipe.transformer, config)
    with pytest.raises(ditq.UnsupportedError, match=r"a copy of x_embedder \(modules_to_save\)"):
        ditq.save(model, tmp_path / "x")
    with pytest.warns(UserWarning, match="adapters are not saved"):
        pipe.transformer.save_pretrained(tmp_path / "y")
    plain = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "y")
    assert "x_embedder.weight" in plain.state_dict()


def test_scales_of_hot_swapped_adapters_are_stored(tmp_path):
    pipe = FLUX.build(0)
    save_adapter(pipe, tmp_path / "lora")
    ditq.quantize(pipe, "w8a16_g32", components="transformer", progress=False)
    pipe.transformer.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="a")
    assert distance(draw(saved(pipe, tmp_path / "x")), draw(pipe)) < 1e-5


def test_weights_that_lie_in_files_are_not_taken_for_weights(tmp_path):
    pipe = quantized()
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    draw(pipe)
    with pytest.raises(ValueError, match="the FluxTransformer2DModel is offloaded to files"):
        ditq.save(pipe, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_asked_for_is_done(tmp_path):
    FLUX.build(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "ditq", "scheme": "w4a8_g32"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))  # by hand, beside 16-bit weights
    load = diffusers.FluxTransformer2DModel.from_pretrained
    assert len(quantized_layers(load(tmp_path, subfolder="transformer"))) == 41
    del config["quantization_config"]
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    some = load(
        tmp_path,
        subfolder="transformer",
        quantization_config=DitqConfig("w8a8", modules_to_not_convert="single_transformer_blocks"),
    )
    assert quantized_layers(some) and not any("single" in name for name in quantized_layers(some))
    with pytest.warns(UserWarning, match="'blocks.7' names no layer that would be quantized"):
        load(tmp_path, subfolder="transformer", quantization_config=DitqConfig(modules_to_not_convert=["blocks.7"]))
    with pytest.raises(TypeError, match="module_to_not_convert"):
        DitqConfig("w8a8", module_to_not_convert=["x"])


def test_a_single_file_is_quantized_as_it_is_loaded(tmp_path):
    FLUX.build(0).transformer.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / "diffusion_pytorch_model.safetensors"),
        config=str(tmp_path),
        quantization_config=DitqConfig("w8a16_g32"),
    )
    states = loaded.state_dict(), quantized().transformer.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_fused_projections(tmp_path):
    pipe = FLUX.build(0)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"projections of transformer_blocks\.0\.attn are fused"):
        ditq.quantize(pipe, "w8a8", progress=False)
    pipe.transformer.unfuse_qkv_projections()
    ditq.quantize(pipe, "w8a8", components="transformer", progress=False)
    before = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    pipe.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"attn\.to_qkv and \d+ more are stored and not loaded"):
        loaded = ditq.load(tmp_path)
    assert distance(draw(loaded), before) < 1e-5


def test_models_made_from_a_quantized_ones_configuration_are_not_quantized(tmp_path):
    model = quantized().transformer
    size = dict(num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2)
    controlnet = diffusers.FluxControlNetModel.from_transformer(model, **size)
    assert "quantization_config" not in controlnet.config
    twin = diffusers.FluxTransformer2DModel.from_config(model.config)
    for name, made in (("controlnet", controlnet), ("twin", twin)):
        made.save_pretrained(tmp_path / name)
        again = type(made).from_pretrained(tmp_path / name)
        assert not quantized_layers(again)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_copies_are_stored_as_they_are(tmp_path):
    copied = copy.deepcopy(quantized().transformer).to(torch.bfloat16)
    copied.save_pretrained(tmp_path / "copy")
    assert ditq.load(tmp_path / "copy").dtype == torch.bfloat16
    cast = quantized()
    cast.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    cast.transformer.save_pretrained(tmp_path / "cast")
    written = json.loads((tmp_path / "cast" / "config.json").read_text())["quantization_config"]["dtype"]
    assert written in ("bfloat16", "float32")


def test_an_adapter_over_a_layer_whose_weights_dtype_is_read():
    pipe = quantized("w4a16_g32", ["transformer", "text_encoder_2"])
    config = LoraConfig(r=4, target_modules=["wo"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.text_encoder_2)
    assert draw(pipe).isfinite().all()


def test_a_model_that_serves_twice_is_quantized_once():
    pipe = ENTRIES["wan"].build(0)
    pipe.register_modules(transformer_2=pipe.transformer)
    ditq.quantize(pipe, "w8a8", progress=False)
    assert pipe.transformer_2 is pipe.transformer and quantized_layers(pipe.transformer)


def test_where_things_are_saved(tmp_path, monkeypatch):
    pipe = quantized()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ditq.save(pipe, tmp_path / "link")
    assert (tmp_path / "real" / "model_index.json").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    ditq.save(pipe, ".")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_the_one_variant_that_is_stored_is_loaded(tmp_path):
    pipe = quantized(components=["transformer", "text_encoder"])
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert distance(draw(ditq.load(tmp_path)), draw(pipe)) < 1e-5
    model = ditq.load(tmp_path / "transformer")
    assert quantized_layers(model).keys() == quantized_layers(pipe.transformer).keys()


def test_plans_of_what_is_not_there():
    pipe = FLUX.build(0)
    plan = ditq.plan(pipe, "w8a8")
    with pytest.raises(KeyError, match="no plan of 'transfomer', but of text_encoder, text_encoder_2, transformer"):
        plan["transfomer"]
    with pytest.raises(ValueError, match="has none of vae"):
        ditq.quantize(pipe, plan, components=["vae"], progress=False)
    for name in list(plan):
        del plan[name]
    with pytest.raises(ValueError, match="the plan is of nothing"):
        ditq.quantize(pipe, plan, progress=False)


def test_smoothing_is_remembered(tmp_path):
    pipe = FLUX.build(0)
    save_adapter(pipe, tmp_path / "lora")
    calibration = ditq.calibrate(pipe.transformer, lambda: draw(pipe), 0)
    ditq.smooth(pipe.transformer, calibration)
    ditq.quantize(pipe, "w8a8", components="transformer", progress=False)
    loaded = saved(pipe, tmp_path / "x")
    for one in (pipe, loaded):
        with pytest.warns(UserWarning, match=r"smoothed.*trained for the model as it was"):
            one.load_lora_weights(tmp_path / "lora", adapter_name="a")
