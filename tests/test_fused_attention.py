"""Fused attention and feed-forward, which add to the residual: what else may happen to their outputs on the way."""

import functools
import gc

import pytest
import torch
from test_fusion import db, output, quantized
from test_fusion_in_company import fused, near

import ditq_kernels as ditq
from ditq_kernels.model import shared_projections
from ditq_kernels.model.substituted_class import class_before


@pytest.mark.parametrize("name", ["DiT", "FLUX", "SD3", "Qwen-Image"])
def test_a_call_leaves_nothing_behind(name):
    model, inputs, _ = fused(name)
    output(model, inputs)
    gc.collect()
    gc.disable()
    try:
        output(model, inputs)
        left = [one for one in gc.get_objects() if isinstance(one, shared_projections._Projections)]
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("name", ["DiT", "PixArt", "SD3", "FLUX", "Qwen-Image"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["attention", "processor"])
def test_code_that_others_put_into_a_class(name, when, what, monkeypatch):
    model, inputs = quantized(name, "w8a8")
    blocks = model.transformer_blocks
    attention = blocks[0].attn1 if hasattr(blocks[0], "attn1") else blocks[0].attn

    def patch():
        cls = class_before(type(attention)) if what == "attention" else type(attention.processor)
        method = "forward" if what == "attention" else "__call__"
        original = getattr(cls, method)

        @functools.wraps(original)
        def half(*args, **kwargs):
            found = original(*args, **kwargs)
            return found * 0.5 if torch.is_tensor(found) else tuple(one * 0.5 for one in found)

        monkeypatch.setattr(cls, method, half)

    if when == "before":
        patch()
    ditq.fuse(model)
    output(model, inputs)
    if when == "after":
        patch()
    found = output(model, inputs)
    assert near(found, output(ditq.unfuse(model), inputs))


class Doubling(torch.nn.Dropout):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", ["DiT", "FLUX", "SD3"])
@pytest.mark.parametrize("place", ["attention", "mlp"])
def test_dropout_that_does_something(name, place):
    model, inputs, expected = fused(name)
    for block in model.transformer_blocks:
        attention = block.attn1 if hasattr(block, "attn1") else block.attn
        holder, number = (attention.to_out, 1) if place == "attention" else (block.ff.net, 1)
        holder[number] = Doubling(0.0)
    found = output(model, inputs)
    assert not near(found, expected) and near(found, output(ditq.unfuse(model), inputs))
    ditq.fuse(model)
    for block in model.transformer_blocks:
        holder, number = (attention.to_out, 1) if place == "attention" else (block.ff.net, 1)
        holder[number] = torch.nn.Dropout(1.0).train()  # all of it
    found = output(model, inputs)
    assert near(found, output(ditq.unfuse(model), inputs))


def test_a_processor_of_another_dtype():
    model, inputs, _ = fused("FLUX")

    class Lower(type(model.single_transformer_blocks[0].attn.processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs).bfloat16()

    for block in model.single_transformer_blocks:
        block.attn.set_processor(Lower())
    found = output(model, inputs)
    assert db(found, output(ditq.unfuse(model), inputs)) > 40


@pytest.mark.parametrize("name", ["DiT", "PixArt"])
def test_attention_that_adds_its_input(name):
    model, inputs, _ = fused(name)
    for block in model.transformer_blocks:
        block.attn1.residual_connection = True
    found = output(model, inputs)
    assert near(found, output(ditq.unfuse(model), inputs))


def test_one_sample_that_is_modulated_for_two():
    model, _, _ = fused("DiT")
    block = model.transformer_blocks[0]
    width = block.norm1.linear.in_features
    x, steps = torch.randn(1, 16, width), torch.tensor([3, 5])
    with torch.no_grad():
        found = block(x, timestep=steps, class_labels=torch.tensor([1, 0]))
        ditq.unfuse(model)
        assert near(found, block(x, timestep=steps, class_labels=torch.tensor([1, 0])))
