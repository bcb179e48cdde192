"""The small pipelines are what other tests take them for."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from small_pipelines import PIPELINES, SmallPipeline, in_own_memory

pytestmark = pytest.mark.usefixtures("one_thread")
Built = tuple[SmallPipeline, DiffusionPipeline, torch.Tensor]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda entry: entry.name)
def built(request: pytest.FixtureRequest) -> Built:
    """An entry, its pipeline, which the tests leave as it is, and what that draws."""
    pipe = request.param.build(0)
    return request.param, pipe, request.param.draw(pipe)


def change(drawn: torch.Tensor, before: torch.Tensor) -> float:
    return float((drawn - before).norm() / before.norm())


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


def test_a_saved_pipeline_draws_the_same_bits(built: Built, tmp_path):
    entry, pipe, drawn = built
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in pipe.components.items()
    }
    assert torch.equal(entry.draw(in_own_memory(loaded)), drawn)
