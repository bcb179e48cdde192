"""The small pipelines are what other tests take them for: every layer that is quantized shows in what they draw."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from small_pipelines import PIPELINES, SmallPipeline, in_own_memory
from torch import nn

import ditq_kernels as ditq

Built = tuple[SmallPipeline, DiffusionPipeline, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer where threads share them; how they are shared shows in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda entry: entry.name)
def built(request: pytest.FixtureRequest) -> Built:
    """An entry, its pipeline, which the tests leave as it is, and what that draws."""
    pipe = request.param.build(0)
    return request.param, pipe, request.param.draw(pipe)


def change(drawn: torch.Tensor, before: torch.Tensor) -> float:
    return float((drawn - before).norm() / before.norm())


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which is not called again with arguments that look the same."""
    results = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        asked = repr((args, kwargs))
        if asked not in results:
            results[asked] = function(*args, **kwargs)
        return results[asked]

    return call


def test_the_names_are_told_apart():
    assert len({entry.name for entry in PIPELINES}) == len(PIPELINES)


def test_the_same_picture_is_drawn_every_time(built: Built):
    entry, pipe, drawn = built
    assert drawn.dim() == (5 if entry.video else 4) and drawn.shape[-3] == 3
    assert torch.equal(entry.draw(pipe), drawn)
    assert torch.equal(entry.draw(entry.build(0)), drawn)


def test_the_picture_is_neither_flat_nor_saturated(built: Built):
    _, _, drawn = built
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.std() > 0.1
    assert ((drawn == 0) | (drawn == 1)).float().mean() < 1 / 3


def test_other_weights_or_words_draw_another_picture(built: Built):
    entry, pipe, drawn = built
    assert change(entry.draw(entry.build(1)), drawn) > 0.1
    other = {"class_labels": [2]} if "class_labels" in entry.call else {"prompt": "an owl"}
    assert change(replace(entry, call={**entry.call, **other}).draw(pipe), drawn) > 1e-3


def test_adapters_are_loaded_where_the_entry_says_so(built: Built):
    entry, pipe, _ = built
    assert hasattr(pipe, "load_lora_weights") == entry.adapters


def test_every_quantized_layer_shows(built: Built, monkeypatch: pytest.MonkeyPatch):
    """A disturbance as of few bits; what cannot show is written in the table, and nothing else is."""
    entry, pipe, _ = built
    if hasattr(pipe, "encode_prompt"):  # no layer of the transformer has a part in it
        monkeypatch.setattr(pipe, "encode_prompt", remembered(pipe.encode_prompt))
    before = entry.draw(pipe, steps=1, latent=True)
    changes = {}
    for layer in ditq.plan(pipe.transformer, "w8a8_g32").quantized():
        module = pipe.transformer.get_submodule(layer.name)
        assert isinstance(module, nn.Linear) and layer.in_features % 32 == 0
        weight = module.weight.detach().clone()
        module.weight.data.add_(torch.randn(weight.shape), alpha=0.15 * weight.std().item())
        changes[layer.name] = change(entry.draw(pipe, steps=1, latent=True), before)
        module.weight.data.copy_(weight)
    assert {name for name, size in changes.items() if size == 0} == set(entry.unseen)
    assert min(size for name, size in changes.items() if name not in entry.unseen) > 1e-4
    assert torch.equal(entry.draw(pipe, steps=1, latent=True), before)


def test_a_saved_pipeline_draws_the_same_bits(built: Built, tmp_path):
    entry, pipe, drawn = built
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in pipe.components.items()
    }
    assert torch.equal(entry.draw(in_own_memory(loaded)), drawn)
