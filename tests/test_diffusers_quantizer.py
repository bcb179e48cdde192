"""Quantized models through diffusers' own ``from_pretrained`` and ``save_pretrained``."""

import copy
import json
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits, tiny_dit

import ditq_kernels as ditq
from ditq_kernels.integrations.diffusers import DitqConfig
from ditq_kernels.model.conversion import quantized_layers

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def in_dtype(model, dtype):
    """As loaders cast: parameters and no tables of positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def quantized(scheme="w4a8_g32", dtype=torch.float32):
    return ditq.quantize(in_dtype(tiny_dit(), dtype), scheme, progress=False)


def output(model):
    torch.manual_seed(1)
    x = torch.randn(2, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    with torch.no_grad():
        return model(x.to(model.dtype), timestep=torch.tensor([3, 3]), class_labels=torch.tensor([0, 1])).sample


@dtypes
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4a16"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_saved_and_loaded_it_has_the_same_bits(scheme, dtype, shards, tmp_path):
    model = quantized(scheme, dtype)
    model.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shards)
    for cls in (DiTTransformer2DModel, diffusers.AutoModel):
        assert_same_bits(model, cls.from_pretrained(str(tmp_path)), output)


def test_a_model_of_static_scales_too(tmp_path):
    model = tiny_dit()
    calibration = ditq.calibrate(model, lambda: output(model), 0)
    ditq.quantize(model, "w8a8_static", calibration, progress=False)
    model.save_pretrained(tmp_path)
    assert_same_bits(model, DiTTransformer2DModel.from_pretrained(tmp_path), output)


def test_another_dtype_is_that_of_what_is_not_quantized(tmp_path):
    quantized().save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = quantized().to(torch.bfloat16)
    expected.pos_embed.pos_embed = loaded.pos_embed.pos_embed  # which a cast rounds, and a loader does not
    assert_same_bits(expected, loaded, output)


@dtypes
def test_a_model_that_is_cast_after_it_was_quantized(dtype, tmp_path):
    model = quantized()
    table = model.pos_embed.pos_embed.clone()
    model.to(dtype).pos_embed.pos_embed = table
    model.save_pretrained(tmp_path)
    assert_same_bits(model, DiTTransformer2DModel.from_pretrained(tmp_path), output)
    again = pickle.loads(pickle.dumps(model.config.quantization_config))
    assert again.to_dict() == model.config.quantization_config.to_dict()
    assert again.dtype == str(dtype).removeprefix("torch.")


@dtypes
def test_quantized_as_it_is_loaded(dtype, tmp_path):
    tiny_dit().save_pretrained(tmp_path, max_shard_size="50KB")
    config = DitqConfig("w4a8_g32")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
    expected = DiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert_same_bits(ditq.quantize(expected, "w4a8_g32", progress=False), loaded, output)
    loaded.save_pretrained(tmp_path / "quantized")
    assert_same_bits(loaded, DiTTransformer2DModel.from_pretrained(tmp_path / "quantized"), output)
    ditq.save(loaded, tmp_path / "ours")
    assert_same_bits(loaded, ditq.load(tmp_path / "ours"), output)


@pytest.mark.parametrize("kept", ["transformer_blocks.0", "attn1", "*.to_q", "ff.net.2"])
def test_modules_that_are_not_converted(kept, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    load = DiTTransformer2DModel.from_pretrained
    every = quantized_layers(load(tmp_path, quantization_config=DitqConfig("w8a8"))).keys()
    some = quantized_layers(
        load(tmp_path, quantization_config=DitqConfig("w8a8", modules_to_not_convert=[kept]))
    ).keys()
    assert some < every and all(kept.strip("*.") in name for name in every - some)
    assert not any(kept.strip("*.") in name for name in some)


def test_a_pipeline_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    pipe = DiTPipeline(transformer=tiny_dit(), vae=vae, scheduler=DDIMScheduler(), id2label={0: "a", 1: "b"})
    ditq.quantize(pipe.transformer, "w4a8_g32", progress=False)
    pipe.save_pretrained(tmp_path / "pipe")
    script = f"""
import torch, ditq_kernels.integrations.diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r})
torch.save(pipe.transformer.state_dict(), {str(tmp_path / "state.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "state.pt")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("scale"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {lost}"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_static_scheme_needs_a_calibration_first():
    with pytest.raises(ValueError, match=r"w8a8_static needs a calibration.*or load it as w8a8"):
        DitqConfig("w8a8_static")
    with pytest.raises(ValueError, match="unknown scheme"):
        DitqConfig("w3a5")


def test_a_configuration_is_plain_json():
    config = DitqConfig.of(quantized())
    again = DitqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and "w4a8_g32" in repr(config)
    assert dict(DitqConfig("w8a8")) and DitqConfig.from_dict(DitqConfig("w8a8").to_dict()).layers is None


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map(device_map, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    load = DiTTransformer2DModel.from_pretrained
    model = load(tmp_path, quantization_config=DitqConfig("w8a8"), device_map=device_map)
    assert_same_bits(ditq.quantize(tiny_dit(), "w8a8", progress=False), model, output)
    model.save_pretrained(tmp_path / "quantized")
    assert_same_bits(model, load(tmp_path / "quantized", device_map=device_map), output)


def test_a_quantized_model_can_still_be_copied_and_cast(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    model = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=DitqConfig("w8a8"))
    assert_same_bits(model, copy.deepcopy(model), output)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.half().dtype == torch.float16
