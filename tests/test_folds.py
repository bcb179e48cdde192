"""Each recipe's folds, on small models of its architecture: smoothing changes what it is meant to change, and the model
computes the same.
"""

import copy
from dataclasses import replace

import pytest
import torch
from small_transformers import SMALL, small_transformer

import ditq_kernels as ditq
from ditq_kernels.model import smoothing
from ditq_kernels.model.planning import plan
from ditq_kernels.model.recipes import RECIPES, recipe_for

pytest.importorskip("diffusers")
ROUNDING = 1e-5  # of the output's norm; with one layer put back the difference is at least three times as large

# Model: how many folds its blocks have in all.
FOLDS = {
    "DiT": 6,
    "PixArt": 4,
    "SD3": 14,
    "SD3.5 medium": 18,
    "FLUX": 14,
    "FLUX.2": 14,
    "Sana": 4,
    "Hunyuan-DiT": 21,
    "HunyuanVideo": 17,
    "HunyuanVideo image to video": 17,
    "CogVideoX": 6,
    "Wan": 6,
    "Wan 2.2 5B": 6,
    "Wan image to video": 6,
    "LTX-Video": 4,
    "Qwen-Image": 10,
    "Qwen-Image-Edit 2511": 10,
    "Lumina-Image 2.0": 12,
    "AuraFlow": 10,
    "Mochi": 12,
    "Chroma": 4,
    "Cosmos": 4,
    "Cosmos 2.5 with a picture": 4,
}
# A fold for the last block alone, whose text goes nowhere, so that nothing depends on the text's queries.
UNUSED = {"SD3": "transformer_blocks.2.attn.add_q_proj", "SD3.5 medium": "transformer_blocks.2.attn.add_q_proj"}
UNUSED |= {"Mochi": "transformer_blocks.1.attn1.add_q_proj"}


@pytest.fixture(autouse=True)
def one_thread():
    """These products are smaller than what it takes to hand them to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SMALL)
def test_a_smoothed_model_computes_the_same(name):
    model, inputs = small_transformer(name)
    expected = draw(model, inputs)
    calibration = ditq.calibrate(model, lambda: draw(model, inputs), 0)
    smoothed = copy.deepcopy(model)
    returned = ditq.smooth(smoothed, calibration)
    assert difference(draw(smoothed, inputs), expected) < ROUNDING

    found = list(smoothing._folds(model))
    assert len(found) == FOLDS[name]
    consumers = {layer for _, fed, _ in found for layer in fed}
    touched = consumers | {layer for *_, makers in found for layer in makers}
    before, after = dict(model.named_modules()), dict(smoothed.named_modules())
    changed = {layer for layer in before if not same(before[layer], after[layer])}
    assert changed == touched

    again = ditq.calibrate(smoothed, lambda: draw(smoothed, inputs), 0)
    for layer, ranges in returned.channel_amax.items():
        torch.testing.assert_close(again.channel_amax[layer], ranges, rtol=1e-3, atol=1e-4 * float(ranges.max()))

    # Each layer matters: where one is as it was before, the model computes something else. The last block's text may go
    # nowhere, hence the first block of each fold.
    first = {}
    for fold, fed, makers in found:
        first.setdefault(fold, {**fed, **makers})
    for layer in {layer for layers in first.values() for layer in layers} - {UNUSED.get(name)}:
        kept = copy.deepcopy(after[layer].state_dict())
        after[layer].load_state_dict(before[layer].state_dict())
        assert difference(draw(smoothed, inputs), expected) > 3 * ROUNDING, layer
        after[layer].load_state_dict(kept)


def same(one, other):
    pairs = zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_recipe_has_a_small_model_and_uses_all_its_folds():
    unused = {fold for recipe in RECIPES.values() for fold in recipe.folds}
    architectures = set()
    for name in SMALL:
        model, _ = small_transformer(name)
        architectures.add(recipe_for(model).architecture)
        unused -= {fold for fold, *_ in smoothing._folds(model)}
    assert architectures == set(RECIPES)
    assert not unused


@pytest.mark.parametrize(
    "name, change",
    [
        ("FLUX", {"shifts": (1,), "gains": (2,)}),
        ("FLUX", {"shifts": (1,), "gains": (0,)}),
        ("FLUX", {"consumers": ("attn.to_q", "attn.to_v")}),
        ("CogVideoX", {"shifts": (0,), "gains": (1,)}),
        ("Mochi", {"gains": (1,)}),
    ],
)
def test_a_wrong_fold_is_seen(name, change, monkeypatch):
    model, inputs = small_transformer(name)
    expected = draw(model, inputs)
    calibration = ditq.calibrate(model, lambda: draw(model, inputs), 0)
    recipe = recipe_for(model)
    wrong = replace(recipe, folds=(replace(recipe.folds[0], **change), *recipe.folds[1:]))
    monkeypatch.setitem(RECIPES, recipe.architecture, wrong)
    ditq.smooth(model, calibration)
    assert difference(draw(model, inputs), expected) > 100 * ROUNDING


def test_an_image_adapter_of_sd3_is_smoothed_along():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model, inputs = small_transformer("SD3.5 medium")
    processors = {name: SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 12) for name in model.attn_processors}
    model.set_attn_processor(processors)
    without = draw(model, inputs)
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": torch.randn(2, 3, 32), "temb": torch.randn(2, 12)}
    expected = draw(model, inputs)
    assert difference(without, expected) > 100 * ROUNDING
    ditq.smooth(model, ditq.calibrate(model, lambda: draw(model, inputs), 0))
    assert difference(draw(model, inputs), expected) < ROUNDING


def test_a_quantized_producer_is_refused():
    model, inputs = small_transformer("FLUX")
    calibration = ditq.calibrate(model, lambda: draw(model, inputs), 0)
    chosen = plan(model, "w8a8")
    chosen.set("*", None)
    chosen["transformer_blocks.1.attn.add_v_proj"] = "w8a8"
    ditq.quantize(model, chosen, progress=False)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn\.add_v_proj is quantized already"):
        ditq.smooth(model, calibration)
