"""Whole pipelines: planned, quantized, saved and loaded with their text encoders, adapters included."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from small_models import tiny_dit, tiny_inputs, tiny_model
from transformers import T5Config, T5EncoderModel

import ditq_kernels as ditq
from ditq_kernels.integrations.diffusers import DitqConfig
from ditq_kernels.model.conversion import quantized_layers


class Encoding(DiTPipeline):
    """A pipeline with a text encoder, and of a kind that takes adapters: what each of the tests is about."""

    def __init__(self, transformer, vae, scheduler, text_encoder, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_modules(text_encoder=text_encoder)


def encoder():
    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)).eval()


def pipeline(dtype=torch.float32):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    pipe = Encoding(tiny_dit(), vae, DDIMScheduler(), encoder())
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(dtype)
    return pipe


def dit_output(model):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8).to(model.dtype)
    with torch.no_grad():
        return model(x, timestep=torch.tensor([3, 3]), class_labels=torch.tensor([0, 1])).sample


def outputs(pipe):
    with torch.no_grad():
        text = pipe.text_encoder(input_ids=torch.arange(10).view(2, 5)).last_hidden_state
    return dit_output(pipe.transformer), text, pipe.vae.decoder.conv_in.weight


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def known_to_diffusers(monkeypatch):
    monkeypatch.setattr("diffusers.Encoding", Encoding, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_one_call_and_back_in_one(dtype, tmp_path):
    pipe = pipeline(dtype)
    before = outputs(pipe)
    assert ditq.quantize(pipe, "w4a8_g32", progress=False) is pipe
    expected = outputs(pipe)
    assert not torch.equal(before[0], expected[0]) and not torch.equal(before[1], expected[1])
    assert {x.scheme.name for x in quantized_layers(pipe.text_encoder).values()} == {"w4a16_g32"}
    assert not quantized_layers(pipe.vae)
    ditq.save(pipe, tmp_path / "pipe")
    loaded = ditq.load(tmp_path / "pipe")
    assert type(loaded) is Encoding and same(outputs(loaded), expected)
    assert {loaded.transformer.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {dtype}
    again = Encoding.from_pretrained(tmp_path / "pipe", dtype=dtype)
    assert same(outputs(again), expected)
    with pytest.raises(FileExistsError, match="exists already"):
        ditq.save(pipe, tmp_path / "pipe")


def test_what_diffusers_saved_is_loaded(tmp_path):
    pipe = ditq.quantize(pipeline(), "w8a8", progress=False)
    pipe.save_pretrained(tmp_path / "pipe")
    assert same(outputs(ditq.load(tmp_path / "pipe")), outputs(pipe))
    assert torch.equal(dit_output(ditq.load(tmp_path / "pipe" / "transformer")), outputs(pipe)[0])
    encoder = ditq.load(tmp_path / "pipe" / "text_encoder")
    assert type(encoder) is T5EncoderModel and len(quantized_layers(encoder)) == 12


def test_quantized_while_a_pipeline_is_loaded(tmp_path):
    from diffusers import PipelineQuantizationConfig

    pipeline().save_pretrained(tmp_path / "pipe")
    config = PipelineQuantizationConfig(
        quant_backend="ditq",
        quant_kwargs={"scheme": "w4a8_g32"},
        components_to_quantize=["transformer", "text_encoder"],
    )
    loaded = Encoding.from_pretrained(tmp_path / "pipe", quantization_config=config)
    assert same(outputs(loaded), outputs(ditq.quantize(pipeline(), "w4a8_g32", progress=False)))
    mapping = {"transformer": DitqConfig("w8a8"), "text_encoder": DitqConfig("w4a8_g32")}
    loaded = Encoding.from_pretrained(
        tmp_path / "pipe", quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    assert {x.scheme.name for x in quantized_layers(loaded.text_encoder).values()} == {"w4a16_g32"}
    every = Encoding.from_pretrained(
        tmp_path / "pipe",
        quantization_config=PipelineQuantizationConfig(quant_backend="ditq", quant_kwargs={"scheme": "w8a8"}),
    )
    assert quantized_layers(every.transformer) and not quantized_layers(every.vae)
    every.save_pretrained(tmp_path / "every")
    assert same(outputs(Encoding.from_pretrained(tmp_path / "every")), outputs(every))


def test_plans_of_a_pipeline(tmp_path):
    pipe = pipeline()
    chosen = ditq.plan(pipe, "w8a8_static")
    assert list(chosen) == ["transformer", "text_encoder"] and len(chosen) == 2
    assert {e.scheme for e in chosen["text_encoder"].quantized()} == {"w8a16"}
    assert "transformer: DiTTransformer2DModel, w8a8_static" in str(chosen) and "text_encoder" in chosen.summary()
    chosen = ditq.plan(pipe, "w8a8")
    chosen["transformer"].set("*.attn1.*", None)
    del chosen["text_encoder"]
    ditq.quantize(pipe, chosen, progress=False)
    assert not quantized_layers(pipe.text_encoder)
    assert quantized_layers(pipe.transformer) and not any(
        "attn1" in name for name in quantized_layers(pipe.transformer)
    )


def test_components_and_calibrations():
    pipe = pipeline()
    calibration = ditq.calibrate(pipe.transformer, lambda: dit_output(pipe.transformer), 0, moments=True)
    ditq.quantize(pipe, "w8a8_static", calibration, "compensated", components="transformer", progress=False)
    assert not quantized_layers(pipe.text_encoder)
    pipe = pipeline()
    ditq.quantize(pipe, "w4a8_g32", {"transformer": calibration}, "compensated", progress=False)
    alone = ditq.quantize(tiny_dit(), "w4a8_g32", calibration, "compensated", progress=False)
    assert torch.equal(dit_output(pipe.transformer), dit_output(alone)) and quantized_layers(pipe.text_encoder)


def test_refusals_touch_nothing():
    pipe = pipeline()
    before = outputs(pipe)
    calibration = ditq.calibrate(pipe.transformer, lambda: dit_output(pipe.transformer), 0)
    wrong = [
        (ValueError, "no model 'unet'; it has transformer, vae", {"components": ["unet"]}),
        (ValueError, "needs calibration=ditq.calibrate", {"scheme_or_plan": "w8a8_static"}),
        (ValueError, "given for 'text', and quantized are", {"calibration": {"text": calibration}}),
        (ValueError, "quantizes no denoiser", {"calibration": calibration, "components": ["text_encoder"]}),
        (ValueError, "needs second moments", {"rounding": "compensated"}),
        (TypeError, "a Plan is of one model", {"scheme_or_plan": ditq.plan(pipe.transformer, "w8a8")}),
    ]
    for kind, match, options in wrong:
        with pytest.raises(kind, match=match):
            ditq.quantize(pipe, **({"scheme_or_plan": "w8a8"} | options), progress=False)
    with pytest.raises(TypeError, match="components name the models of a pipeline"):
        ditq.quantize(pipe.transformer, "w8a8", components=["transformer"])
    assert same(outputs(pipe), before)
    ditq.quantize(pipe, "w8a8", components="text_encoder", progress=False)
    with pytest.raises(ValueError, match="T5EncoderModel is quantized already"):
        ditq.quantize(pipe, "w8a8", progress=False)
    assert not quantized_layers(pipe.transformer)
    with pytest.raises(ValueError, match="holds no quantized layers to save"):
        ditq.save(pipeline(), "nowhere")


def test_pipelines_of_before_still_load(tmp_path):
    from ditq_kernels.checkpoint.store import _save_tensors

    pipe = ditq.quantize(pipeline(), "w4a8_g32", components="transformer", progress=False)
    pipe.save_pretrained(tmp_path / "pipe")
    for file in (tmp_path / "pipe" / "transformer").iterdir():
        file.unlink()
    (tmp_path / "pipe" / "transformer").rmdir()
    _save_tensors(pipe.transformer, tmp_path / "pipe" / "transformer")
    assert same(outputs(ditq.load(tmp_path / "pipe")), outputs(pipe))


class AdaptableDiT(DiTTransformer2DModel, PeftAdapterMixin):
    """As diffusers' models that pipelines load adapters into."""


def add_lora(model, name, targets, seed):
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, target_modules=targets), adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.normal_(std=0.05)


def adapted(scheme="w4a8_g32"):
    model = tiny_dit()
    model.__class__ = AdaptableDiT
    ditq.quantize(model, scheme, progress=False)
    add_lora(model, "one", ["to_q", "to_v"], 1)
    add_lora(model, "other", ["to_q", "ff.net.2"], 2)
    return model


@pytest.fixture
def adaptable(monkeypatch):
    monkeypatch.setattr("diffusers.AdaptableDiT", AdaptableDiT, raising=False)


def test_adapters_are_saved_beside_the_weights_and_loaded(adaptable, tmp_path):
    model = adapted()
    model.set_adapters(["one", "other"], [0.7, 0.25])
    expected = dit_output(model)
    ditq.save(model, tmp_path / "model")
    names = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert {"adapters/0/adapter_model.safetensors", "adapters/1/adapter_config.json"} < names
    assert torch.equal(dit_output(model), expected), "saving has changed it"
    loaded = ditq.load(tmp_path / "model")
    assert torch.equal(dit_output(loaded), expected)
    for choose in (lambda m: m.set_adapters(["other"], [1.0]), lambda m: m.disable_adapters()):
        choose(model)
        choose(loaded)
        assert torch.equal(dit_output(loaded), dit_output(model))
    with pytest.warns(UserWarning, match="one, other: adapters were stored with this AdaptableDiT; ditq.load attaches"):
        plain = AdaptableDiT.from_pretrained(tmp_path / "model")
    assert torch.equal(dit_output(plain), dit_output(model)), "diffusers loads the model without them"


def test_one_that_is_merged_is_part_of_the_weights(adaptable, tmp_path):
    model = adapted("w8a8")
    model.set_adapters(["one", "other"], [0.5, 0.5])
    with pytest.warns(ditq.layer.linear.RequantizationWarning):
        model.fuse_lora(adapter_names=["one"])
    ditq.save(model, tmp_path / "model")
    assert list(json.loads((tmp_path / "model" / "adapters" / "state.json").read_text())["adapters"]) == ["other"]
    loaded = ditq.load(tmp_path / "model")
    states = quantized_layers(model), quantized_layers(loaded)
    assert [p.tolist() for x in states[0].values() for p in x.parameters()] == [
        p.tolist() for x in states[1].values() for p in x.parameters()
    ]


def test_diffusers_saves_the_model_without_its_adapters(adaptable, tmp_path):
    model = adapted()
    with pytest.warns(UserWarning, match=r"one, other: adapters are not saved.*ditq\.save"):
        model.save_pretrained(tmp_path)
    loaded = AdaptableDiT.from_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(dit_output(loaded), dit_output(model))


def test_adapters_of_models_of_ones_own(tmp_path):
    import peft

    torch.manual_seed(3)
    model = ditq.quantize(tiny_model(), "w8a8", progress=False)
    adapted = peft.get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "up"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted.eval()(*tiny_inputs())
    ditq.save(adapted, tmp_path / "model")
    loaded = ditq.load(tmp_path / "model", model=tiny_model(1))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(*tiny_inputs()), expected)
    assert json.loads((tmp_path / "model" / "adapters" / "state.json").read_text())["adapters"] == {"default": "0"}


def test_adapters_keep_the_dtype_that_they_were_trained_in(tmp_path):
    import peft

    torch.manual_seed(3)
    model = ditq.quantize(tiny_model().to(torch.bfloat16), "w4a16_g32", progress=False)
    adapted = peft.get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "up"], init_lora_weights=False))
    trained = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    ditq.save(adapted, tmp_path / "model")
    loaded = ditq.load(tmp_path / "model", model=tiny_model(1))
    found = {name: p for name, p in loaded.named_parameters() if "lora" in name}
    assert found.keys() == trained.keys() and all(p.requires_grad for p in found.values())
    assert all(p.dtype == torch.float32 and torch.equal(p, trained[name]) for name, p in found.items())


def test_offloaded_pipelines_are_not_saved(tmp_path):
    pipe = ditq.quantize(pipeline(), "w8a8", progress=False)
    pipe.transformer.proj_out_2.to("meta")
    with pytest.raises(ValueError, match=r"transformer\.proj_out_2\.weight is on the meta device"):
        ditq.save(pipe, tmp_path / "pipe")
    assert not list(tmp_path.iterdir())


def test_the_base_class_finds_the_pipeline(tmp_path):
    ditq.quantize(pipeline(), "w8a8", progress=False).save_pretrained(tmp_path / "pipe")
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "pipe"), Encoding)
