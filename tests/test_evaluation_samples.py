"""Samples on disk: the same whoever draws them, and whatever interrupts it."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from small_sources import small_dit

import ditq_kernels as ditq
from ditq_kernels.evaluation.samples import Request, digest, draw, fingerprint, load, save_for_other_evaluators
from ditq_kernels.integrations.sampling import default_scheduler, sample

REQUEST = Request("small", "0123", classes=3, count=7, first_seed=40, steps=3, guidance=2.0, batch=2)


@pytest.fixture(scope="module")
def model():
    return small_dit()


@pytest.fixture(scope="module")
def draws(model):
    return partial(sample, model, default_scheduler(), steps=3, guidance=2.0, progress=False)


@pytest.fixture(scope="module")
def drawn(draws, tmp_path_factory):
    directory = tmp_path_factory.mktemp("drawn") / "samples"
    assert draw(REQUEST, draws, directory, progress=False) == 4
    return directory


def test_the_samples_are_the_samplers(drawn, model):
    found = load(REQUEST, drawn)
    assert found.shape[0] == 7 and REQUEST.labels == [0, 1, 2, 0, 1, 2, 0] and REQUEST.seeds[-1] == 46
    last = sample(model, default_scheduler(), [0], [46], steps=3, guidance=2.0, progress=False)
    assert torch.equal(found[6:], last)


def test_two_processes_draw_what_one_does(drawn, draws, tmp_path):
    done = [draw(REQUEST, draws, tmp_path, process=i, processes=2, progress=False) for i in (1, 0)]
    assert done == [2, 2] and torch.equal(load(REQUEST, tmp_path), load(REQUEST, drawn))


def test_an_interrupted_run_goes_on_where_it_stopped(drawn, draws, tmp_path, monkeypatch):
    import safetensors.torch

    original, saved = safetensors.torch.save_file, []

    def interrupted(tensors, path, **about):
        if len(saved) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        saved.append(path)
        original(tensors, path, **about)

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(REQUEST, draws, tmp_path, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="lacks 2 of 4 batches, 0000004"):
        load(REQUEST, tmp_path)
    assert draw(REQUEST, draws, tmp_path, progress=False) == 2
    assert torch.equal(load(REQUEST, tmp_path), load(REQUEST, drawn))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in drawn.iterdir())


@pytest.mark.parametrize(
    "change", [dict(steps=4), dict(model="other"), dict(fingerprint="4567"), dict(batch=3), dict(guidance=1.0)]
)
def test_samples_of_something_else_are_refused(drawn, draws, change):
    other = dataclasses.replace(REQUEST, **change)
    (name,) = change
    for call in (lambda: load(other, drawn), lambda: draw(other, draws, drawn)):
        with pytest.raises(ValueError, match=f"holds samples with {name} = "):
            call()


def test_a_fingerprint_tells_weights_and_schedulers_apart(model):
    found = fingerprint(model, default_scheduler())
    other = small_dit()
    assert fingerprint(other, default_scheduler()) == found
    with torch.no_grad():
        other.proj_out_2.bias[0] = torch.nextafter(other.proj_out_2.bias[0], torch.tensor(9.0))
    scheduler = default_scheduler()
    changed = scheduler.from_config(scheduler.config, beta_end=0.03)
    assert len({found, fingerprint(other, scheduler), fingerprint(model, changed)}) == 3
    assert fingerprint(small_dit().bfloat16(), scheduler) != found
    # The same bytes are another model where they are multiplied another way.
    quantized = [small_dit(heads=4, head_dim=32) for _ in range(2)]
    for one, scheme in zip(quantized, ("w4a8_g32", "w4a16_g32"), strict=True):
        ditq.quantize(one, scheme, progress=False)
    assert len({fingerprint(one, scheduler) for one in quantized}) == 2


def test_the_layout_of_other_evaluators(tmp_path):
    pictures = torch.linspace(-1, 1, 2 * 16).view(2, 1, 4, 4)
    save_for_other_evaluators(pictures.split(1), [3, 1], tmp_path / "samples.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as found:
        assert found["arr_0"].shape == (2, 4, 4, 3) and found["arr_0"].dtype == np.uint8
        assert found["arr_0"].min() == 0 and found["arr_0"].max() == 255 and found["arr_1"].tolist() == [3, 1]
        assert (found["arr_0"][..., 0] == found["arr_0"][..., 2]).all()


def test_a_digest_does_not_depend_on_the_order_of_what_it_is_of():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
