"""Smoothing changes nothing but what is rounded, and says what calibrating again would find."""

import copy

import pytest
import torch
from small_models import tiny_model, tiny_run
from small_sources import small_dit

import ditq_kernels as ditq
from ditq_kernels.analysis.sensitivity import forms_of, output_losses
from ditq_kernels.integrations.sampling import default_scheduler, sample

CONSUMERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")


def draw(model):
    return sample(model, default_scheduler(), [0, 1, 2], [0, 1, 2], steps=3, progress=False)


def dit_with_outliers():
    """A DiT whose first attention products and MLP are fed two channels far larger than the others."""
    model = small_dit(heads=4, head_dim=32, layers=2)
    with torch.no_grad():
        for block in model.transformer_blocks:
            shift, gain, *_ = block.norm1.linear.bias.view(6, -1)
            shift[3], gain[5] = 9.0, 14.0
    return model


@pytest.fixture(scope="module")
def model():
    return dit_with_outliers()


@pytest.fixture(scope="module")
def calibration(model):
    return ditq.calibrate(model, lambda: draw(model), 1, moments=True)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_smoothed_model_draws_the_same(model, calibration, strength):
    smoothed = copy.deepcopy(model)
    ditq.smooth(smoothed, calibration, strength)
    assert not torch.equal(
        smoothed.transformer_blocks[0].attn1.to_q.weight, model.transformer_blocks[0].attn1.to_q.weight
    )
    expected = draw(model)
    assert (draw(smoothed) - expected).norm() < 1e-4 * expected.norm()


def test_columns_of_16_bits_are_rounded_once(model, calibration):
    smoothed = copy.deepcopy(model).bfloat16()
    before = smoothed.transformer_blocks[0].attn1.to_q.weight.double()
    ditq.smooth(smoothed, calibration)
    exact = copy.deepcopy(model).bfloat16().float()
    ditq.smooth(exact, calibration)
    expected = exact.transformer_blocks[0].attn1.to_q.weight.double()
    found = smoothed.transformer_blocks[0].attn1.to_q.weight.double()
    gain = (found * expected).sum(0) / (expected * expected).sum(0)  # of each column: its rounding errors cancel
    assert (gain - 1).abs().max() < 2e-3 and not torch.equal(found, before)


def test_what_is_returned_is_what_calibrating_again_finds(model, calibration):
    smoothed = copy.deepcopy(model)
    returned = ditq.smooth(smoothed, calibration)
    again = ditq.calibrate(smoothed, lambda: draw(smoothed), 1, moments=True)
    assert returned.amax.keys() == again.amax.keys()
    for name in again.amax:
        assert returned.amax[name] == pytest.approx(again.amax[name], rel=1e-4)
        torch.testing.assert_close(returned.channel_amax[name], again.channel_amax[name], rtol=1e-4, atol=1e-5)
        error = (returned.moments[name] - again.moments[name]).norm()
        assert error < 1e-4 * again.moments[name].norm()
    assert returned.moments["transformer_blocks.0.attn1.to_q"] is returned.moments["transformer_blocks.0.attn1.to_k"]


def test_full_strength_levels_the_channels(model, calibration):
    returned = ditq.smooth(copy.deepcopy(model), calibration, 1.0)
    for name, amax in returned.channel_amax.items():
        before = calibration.channel_amax[name]
        if name.endswith(CONSUMERS):
            torch.testing.assert_close(amax[before > 0], torch.ones_like(amax[before > 0]))
        else:
            assert torch.equal(amax, before)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_products_fed_outliers_come_out_cleaner(model, calibration, scheme):
    def snr_db(of, ranges):
        forms = forms_of(of, [scheme], ranges.amax)
        losses = output_losses(of, lambda: draw(of), forms, ranges.amax, ranges.step)
        return {name: loss[scheme].snr_db for name, loss in losses.items()}

    smoothed = copy.deepcopy(model)
    after, before = snr_db(smoothed, ditq.smooth(smoothed, calibration)), snr_db(model, calibration)
    gain = {name: after[name] - before[name] for name in before}
    assert min(gain[f"transformer_blocks.{block}.attn1.to_{part}"] for block in (0, 1) for part in "qkv") > 3
    assert gain["transformer_blocks.1.ff.net.2"] == pytest.approx(0, abs=0.3)  # nothing to fold into


def test_the_calibration_given_is_left_as_it_was(model, calibration):
    before = copy.deepcopy(vars(calibration))
    ditq.smooth(copy.deepcopy(model), calibration)
    for name, moment in before["moments"].items():
        assert torch.equal(moment, calibration.moments[name])
    assert before["amax"] == calibration.amax


def test_errors(model, calibration):
    untouched = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"must come from ditq\.calibrate, got float"):
        ditq.smooth(untouched, 0.5)
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 2"):
        ditq.smooth(untouched, calibration, 2)
    tiny = tiny_model()
    with pytest.raises(ValueError, match="TinyModel cannot be smoothed: its recipe names no layer"):
        ditq.smooth(tiny, ditq.calibrate(tiny, tiny_run(tiny), 0))
    with pytest.raises(ValueError, match="calibration was taken on another model"):
        ditq.smooth(tiny, calibration)
    percentiles = ditq.calibrate(untouched, lambda: draw(untouched), 1, percentile=99)
    with pytest.raises(ValueError, match="calibrate without a percentile"):
        ditq.smooth(untouched, percentiles)
    for ours, theirs in zip(untouched.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    unbiased = copy.deepcopy(model)
    unbiased.transformer_blocks[1].norm1.linear.bias = None
    before = copy.deepcopy(unbiased.state_dict())
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1\.linear has no bias"):
        ditq.smooth(unbiased, calibration)
    assert all(torch.equal(value, before[name]) for name, value in unbiased.state_dict().items())
    quantized = ditq.quantize(copy.deepcopy(model), "w8a8", progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        ditq.smooth(quantized, calibration)


@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a8_g32"])
def test_only_a_calibration_of_the_model_as_it_is_quantizes_it(model, calibration, scheme, tmp_path):
    """Ranges and moments from before smoothing cost 12 dB."""
    rounding = "nearest" if scheme.endswith("static") else "compensated"
    smoothed = copy.deepcopy(model)
    ours = ditq.smooth(smoothed, calibration)
    for one in (calibration, ours):
        one.save(tmp_path / "a.safetensors")
        assert ditq.Calibration.load(tmp_path / "a.safetensors").smoothed == one.smoothed
    with pytest.raises(ValueError, match=r"before the model was smoothed: take the one that ditq.smooth returned"):
        ditq.quantize(smoothed, scheme, calibration, rounding=rounding)
    with pytest.raises(ValueError, match="of the smoothed model, and this one is not"):
        ditq.quantize(copy.deepcopy(model), scheme, ours, rounding=rounding)
    again = ditq.calibrate(smoothed, lambda: draw(smoothed), 1, moments=True)
    for one in (ours, again):
        ditq.quantize(copy.deepcopy(smoothed), scheme, one, rounding=rounding)
