"""Every recipe meets the published models of its architecture: each layer has a rule of its own, and what becomes of
how many layers and parameters is written down.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from published_models import MODELS, page, parameters, planned
from small_transformers import SMALL, small_transformer

from ditq_kernels.model import recipes
from ditq_kernels.model.conversion import quantize
from ditq_kernels.model.planning import plan
from ditq_kernels.model.recipes import RECIPES, Recipe

pytest.importorskip("diffusers")
ROOT = Path(__file__).parent.parent
LARGE = 16_000_000  # weights; a layer of so many is not left in 16 bits for being small

# Name: linear layers, of these quantized, of these with 16-bit activations; parameters, the share of them quantized.
COUNTS = {
    "DiT-XL/2 256": (254, 197, 29, 749_826_464, 0.8956),
    "PixArt-alpha XL 1024": (290, 281, 1, 611_349_152, 0.9855),
    "PixArt-Sigma XL 1024": (286, 281, 1, 610_856_096, 0.9863),
    "SD3 medium": (340, 334, 49, 2_028_328_000, 0.9922),
    "SD3.5 medium": (392, 386, 49, 2_243_171_520, 0.9929),
    "SD3.5 large": (536, 530, 77, 8_056_627_520, 0.9962),
    "FLUX.1-schnell": (502, 495, 77, 11_891_178_560, 0.9968),
    "FLUX.1-dev": (504, 495, 77, 11_901_408_320, 0.9959),
    "FLUX.1 Canny, Depth": (504, 495, 77, 11_901_604_928, 0.9959),
    "FLUX.1-Fill": (504, 495, 77, 11_902_391_360, 0.9959),
    "FLUX.2-dev": (203, 199, 7, 32_223_281_152, 0.9999),
    "FLUX.2-klein 4B": (109, 106, 6, 3_875_544_576, 0.9996),
    "Sana 1600M": (166, 161, 1, 1_604_462_752, 0.5191),
    "Sana 1.5 4.8B": (486, 481, 1, 4_721_825_952, 0.5164),
    "Hunyuan-DiT 1.2": (471, 462, 43, 1_499_952_032, 0.9780),
    "HunyuanVideo": (547, 535, 83, 12_821_012_544, 0.9937),
    "CogVideoX 2B": (245, 241, 61, 1_693_783_872, 0.9936),
    "CogVideoX 5B": (341, 337, 85, 5_570_283_072, 0.9968),
    "CogVideoX 1.5 5B": (342, 337, 85, 5_570_676_352, 0.9967),
    "Wan 2.1 1.3B": (306, 304, 4, 1_418_996_800, 0.9987),
    "Wan 2.1 14B": (406, 404, 4, 14_288_491_584, 0.9995),
    "Wan 2.1 14B image to video": (488, 484, 4, 16_394_878_784, 0.9990),
    "Wan 2.2 5B": (306, 304, 4, 4_999_787_712, 0.9991),
    "Wan 2.2 14B image to video, each of two": (406, 404, 4, 14_288_901_184, 0.9995),
    "LTX-Video 0.9 2B": (287, 284, 4, 1_923_385_472, 0.9988),
    "LTX-Video 0.9.7 13B": (487, 484, 4, 13_042_569_344, 0.9995),
    "Qwen-Image": (846, 841, 121, 20_430_401_088, 0.9987),
    "Lumina-Image 2.0": (244, 239, 29, 2_609_769_152, 0.9971),
    "AuraFlow": (326, 321, 41, 6_833_439_744, 0.9971),
    "Mochi 1": (677, 673, 100, 10_027_677_744, 0.9982),
    "Chroma": (433, 429, 11, 8_899_983_424, 0.9983),
    "Cosmos 1 7B": (454, 452, 172, 7_236_192_256, 0.9997),
    "Cosmos 1 14B": (582, 580, 220, 14_267_149_312, 0.9998),
    "Cosmos 2 2B": (454, 452, 172, 1_956_405_248, 0.9999),
    "Cosmos 2.5 2B": (455, 453, 173, 2_059_174_912, 0.9999),
}

# Architecture: the layers that get few bits and 16-bit activations, numbers of blocks and layers written as #.
WEIGHT_ONLY = {
    "DiTTransformer2DModel": {"transformer_blocks.#.norm1.linear", "proj_out_1"},
    "PixArtTransformer2DModel": {"adaln_single.linear"},
    "SD3Transformer2DModel": {
        "transformer_blocks.#.norm1.linear",
        "transformer_blocks.#.norm1_context.linear",
        "norm_out.linear",
    },
    "FluxTransformer2DModel": {
        "transformer_blocks.#.norm1.linear",
        "transformer_blocks.#.norm1_context.linear",
        "single_transformer_blocks.#.norm.linear",
        "norm_out.linear",
    },
    "Flux2Transformer2DModel": {
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "norm_out.linear",
        "time_guidance_embed.timestep_embedder.linear_2",
        "time_guidance_embed.guidance_embedder.linear_2",
        "context_embedder",
    },
    "SanaTransformer2DModel": {"time_embed.linear"},
    "HunyuanDiT2DModel": {
        "blocks.#.norm1.linear",
        "norm_out.linear",
        "text_embedder.linear_1",
        "text_embedder.linear_2",
    },
    "HunyuanVideoTransformer3DModel": {
        "context_embedder.token_refiner.refiner_blocks.#.norm_out.linear",
        "transformer_blocks.#.norm1.linear",
        "transformer_blocks.#.norm1_context.linear",
        "single_transformer_blocks.#.norm.linear",
        "norm_out.linear",
    },
    "CogVideoXTransformer3DModel": {
        "transformer_blocks.#.norm1.linear",
        "transformer_blocks.#.norm2.linear",
        "norm_out.linear",
    },
    "WanTransformer3DModel": {
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
    },
    "LTXVideoTransformer3DModel": {
        "time_embed.emb.timestep_embedder.linear_2",
        "time_embed.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks.#.img_mod.1",
        "transformer_blocks.#.txt_mod.1",
        "norm_out.linear",
    },
    "Lumina2Transformer2DModel": {"layers.#.norm1.linear", "noise_refiner.#.norm1.linear", "norm_out.linear_1"},
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks.#.norm1.linear",
        "joint_transformer_blocks.#.norm1_context.linear",
        "single_transformer_blocks.#.norm1.linear",
        "norm_out.linear",
    },
    "MochiTransformer3DModel": {
        "time_embed.pooler.to_q",
        "time_embed.pooler.to_kv",
        "time_embed.pooler.to_out",
        "transformer_blocks.#.norm1.linear",
        "transformer_blocks.#.norm1_context.linear",
        "transformer_blocks.#.norm1_context.linear_1",
        "norm_out.linear",
    },
    "ChromaTransformer2DModel": {
        "distilled_guidance_layer.layers.#.linear_1",
        "distilled_guidance_layer.layers.#.linear_2",
        "distilled_guidance_layer.out_proj",
    },
    "CosmosTransformer3DModel": {
        "time_embed.t_embedder.linear_1",
        "time_embed.t_embedder.linear_2",
        "crossattn_proj.0",
        *(f"transformer_blocks.#.norm{norm}.linear_{part}" for norm in "123" for part in "12"),
        "norm_out.linear_1",
        "norm_out.linear_2",
    },
}


def models_of(architecture):
    return [name for name, (known, _) in MODELS.items() if known == architecture]


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name):
    chosen = planned(name)
    quantized = chosen.quantized()
    weight_only = [entry for entry in quantized if entry.scheme == "w4a16_g128"]
    share = sum(entry.weights for entry in quantized) / parameters(chosen)
    found = (len(chosen), len(quantized), len(weight_only), parameters(chosen), round(share, 4))
    assert found == COUNTS[name]
    assert not [entry.name for entry in chosen if "no rule" in entry.reason]
    assert not [entry.name for entry in chosen if entry.scheme is None and entry.weights > LARGE]


@pytest.mark.parametrize("architecture", RECIPES)
def test_every_recipe_meets_a_published_model_which_needs_all_its_rules(architecture):
    models = models_of(architecture)
    assert models, f"tests/published_models.py has no {architecture}"
    recipe = RECIPES[architecture]
    needed = {recipe.rule_for(entry.name) for name in models for entry in planned(name)}
    # Rules for variants that no configuration here is of.
    others = {rule for rule in recipe if "given picture" in rule.reason}
    assert set(recipe) - others <= needed
    assert len({rule.pattern for rule in recipe}) == len(recipe.rules)


@pytest.mark.parametrize("architecture", RECIPES)
def test_what_is_fed_few_rows_gets_few_bits_alone(architecture):
    entries = [entry for name in models_of(architecture) for entry in planned(name)]
    found = {re.sub(r"\.\d+\.(?=.)", ".#.", entry.name) for entry in entries if entry.scheme == "w4a16_g128"}
    assert found == WEIGHT_ONLY[architecture]


@pytest.mark.parametrize("name", SMALL)
def test_small_models_run_in_8_bits(name):
    """Models read the dtype of some of their layers: what they read must not be a quantized one's."""
    model, inputs = small_transformer(name)
    model.bfloat16()
    inputs = torch.utils._pytree.tree_map(in_16_bits, inputs)
    chosen = plan(model, "w8a8")
    assert not [entry.name for entry in chosen if "no rule" in entry.reason]
    with torch.no_grad():
        expected = model(**inputs).sample.float()
        found = quantize(model, chosen, progress=False)(**inputs).sample.float()
    assert (found - expected).norm() < 0.5 * expected.norm()


def in_16_bits(value):
    return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value


def test_every_data_file_is_registered():
    folder = Path(recipes.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "encoder", "general", "rule"}
    held = {}
    for file in files:
        module = importlib.import_module(f"{recipes.__name__}.{file}")
        held[file] = [value for value in vars(module).values() if isinstance(value, Recipe)]
    assert all(len(of_file) == 1 for of_file in held.values())
    assert {id(recipe) for of_file in held.values() for recipe in of_file} == {id(r) for r in RECIPES.values()}


def test_a_recipe_is_named_after_a_class_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, architecture) for architecture in RECIPES)


def test_the_page_of_sizes_is_up_to_date():
    assert (ROOT / "docs" / "models.md").read_text() == page(), "run python tests/published_models.py"


# Of each architecture, layers that an activation function feeds, by the ends of their names.
BEHIND_ACTIVATION = {
    **{name: {"ff.net.2"} for name in ("DiT", "PixArt", "Hunyuan-DiT", "CogVideoX", "LTX-Video", "Cosmos")},
    **{name: {"ff.net.2", "ff_context.net.2"} for name in ("SD3", "Mochi")},
    **{name: {"ff.net.2", "ff_context.net.2", "proj_out"} for name in ("FLUX", "HunyuanVideo", "Chroma")},
    "FLUX.2": {"ff.linear_out", "ff_context.linear_out", "attn.to_out"},
    "Sana": set(),
    "Wan": {"ffn.net.2"},
    "Qwen-Image": {"img_mlp.net.2", "txt_mlp.net.2"},
    "Lumina-Image 2.0": {"feed_forward.linear_2"},
    "AuraFlow": {"ff.out_projection", "ff_context.out_projection"},
}


@pytest.mark.parametrize("name", BEHIND_ACTIVATION)
def test_what_activation_functions_feed_is_known(name):
    model, _ = small_transformer(name)
    chosen = plan(model, "w8a8_semistatic")
    behind = {entry.name for entry in chosen.quantized() if "found at run time" in entry.reason}
    ends = BEHIND_ACTIVATION[name]
    assert {end for end in ends if any(one.endswith("." + end) for one in behind)} == ends
    assert all(one.endswith(tuple("." + end for end in ends)) for one in behind)
    assert not any(one == "proj_out" for one in behind)
