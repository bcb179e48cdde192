"""Text encoders through transformers' own ``from_pretrained`` and ``save_pretrained``, quantized or to be so."""

import subprocess
import sys

import pytest
import torch
import transformers
from small_models import assert_same_bits
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import ditq_kernels as ditq
from ditq_kernels.integrations.transformers import DitqConfig
from ditq_kernels.model.conversion import quantized_layers

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def t5(gated=True):
    kind = "gated-gelu" if gated else "relu"
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj=kind)
    return T5EncoderModel(config)


def clip():
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return CLIPTextModel(config)


def qwen(tied=True):
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


MODELS = {"t5": t5, "ungated t5": lambda: t5(False), "clip": clip, "qwen": qwen, "untied qwen": lambda: qwen(False)}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def built(build, dtype=torch.float32):
    """In ``dtype`` as loaders cast: parameters, and no tables of positions."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def output(model):
    tokens = torch.arange(10).view(2, 5) + 3
    with torch.no_grad():
        return model(input_ids=tokens)[0]


@dtypes
@models
def test_saved_and_loaded_it_has_the_same_bits(build, dtype, tmp_path):
    model = built(build, dtype)
    before = output(model)
    ditq.quantize(model, "w4a8_g32", progress=False)
    assert not torch.equal(before, output(model))
    model.save_pretrained(tmp_path)
    assert_same_bits(model, type(model).from_pretrained(tmp_path), output)


@dtypes
@models
def test_quantized_as_it_is_loaded(build, dtype, tmp_path):
    built(build).save_pretrained(tmp_path)
    load = type(built(build)).from_pretrained
    loaded = load(tmp_path, quantization_config=DitqConfig("w8a8_g32"), dtype=dtype)
    expected = ditq.quantize(load(tmp_path, dtype=dtype), "w8a8_g32", progress=False)
    assert_same_bits(expected, loaded, output)
    loaded.save_pretrained(tmp_path / "quantized")
    assert_same_bits(loaded, load(tmp_path / "quantized"), output)
    half = load(tmp_path / "quantized", dtype=torch.float16)
    assert output(half).dtype == torch.float16 and output(half).isfinite().all()
    assert all(layer.scale.dtype == torch.float32 for layer in quantized_layers(half).values())


def test_by_the_auto_class_in_shards_and_in_a_fresh_process(tmp_path):
    model = ditq.quantize(built(clip), "w4a16_g32", progress=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    script = f"""
import torch, ditq_kernels.integrations.transformers, sys
assert "diffusers" not in sys.modules
from transformers import AutoModel
torch.save(AutoModel.from_pretrained({str(tmp_path)!r}).state_dict(), {str(tmp_path / "state.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "state.pt")
    found = AutoModel.from_pretrained(tmp_path).state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@models
def test_activations_of_encoders_stay_in_16_bits_and_tied_layers_as_they_are(build):
    model = built(build)
    chosen = ditq.plan(model, "w8a8")
    assert {entry.scheme for entry in chosen.quantized()} == {"w8a16"}
    assert "encoder" in chosen.quantized()[0].reason
    assert [e.name for e in chosen if e.scheme is None] == (["lm_head"] if hasattr(model, "lm_head") else [])


def test_a_layer_tied_to_an_embedding_is_never_quantized(tmp_path):
    model = built(qwen)
    chosen = ditq.plan(model, "w8a8")
    with pytest.raises(ValueError, match=r"lm_head cannot be quantized: its weight is also that of model.embed_tokens"):
        chosen["lm_head"] = "w8a8"
    free = built(MODELS["untied qwen"])
    chosen = ditq.plan(free, "w8a8")
    chosen["lm_head"] = "w8a16"
    free.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=DitqConfig(plan=chosen))
    assert_same_bits(ditq.quantize(free, chosen, progress=False), loaded, output)
    assert "lm_head" in quantized_layers(loaded)


def test_modules_that_are_not_converted(tmp_path):
    built(t5).save_pretrained(tmp_path)
    config = DitqConfig("w8a8", modules_to_not_convert=["SelfAttention", "*.wo"])
    layers = quantized_layers(T5EncoderModel.from_pretrained(tmp_path, quantization_config=config))
    assert {name.rpartition(".")[2] for name in layers} == {"wi_0", "wi_1"}


def test_a_plan_of_another_model_is_refused(tmp_path):
    built(t5).save_pretrained(tmp_path)
    config = DitqConfig(plan=ditq.plan(built(clip), "w8a8"))
    with pytest.raises(ValueError, match="the plan is not this model's: T5EncoderModel has no linear layer"):
        T5EncoderModel.from_pretrained(tmp_path, quantization_config=config)


def test_a_device_map(tmp_path):
    built(t5).save_pretrained(tmp_path)
    model = T5EncoderModel.from_pretrained(tmp_path, quantization_config=DitqConfig("w8a8"), device_map={"": "cpu"})
    assert_same_bits(ditq.quantize(built(t5), "w8a8", progress=False), model, output)


def test_it_is_known_by_its_name():
    assert transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] is DitqConfig
