"""The analysis: its statistics against direct computation, what it says of models whose answer is known, its page."""

import copy
import json
import math
import re

import pytest
import torch
from small_models import dit_inputs, snapshot, tiny_dit, tiny_inputs, tiny_model, tiny_run, unchanged
from small_sources import small_dit
from torch import nn

from ditq_kernels import QuantLinear, cli
from ditq_kernels.analysis import report
from ditq_kernels.analysis.analyze import Analysis, analyze, gentler, recommended_plan
from ditq_kernels.analysis.observe import attention_modules, observe_run
from ditq_kernels.analysis.sensitivity import (
    Loss,
    draw_losses,
    forms_of,
    output_losses,
    relative_error,
    squared_errors,
)
from ditq_kernels.analysis.statistics import BINS, Histogram, InputStatistics, edge
from ditq_kernels.analysis.weights import signal_to_noise, weight_statistics
from ditq_kernels.model.calibration import DEFAULT_STEP
from ditq_kernels.model.planning import plan

# Statistics


def test_a_histogram_counts_every_value_once_and_in_its_bin():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-12, 8, (2000,)), torch.zeros(7)])
    found = Histogram()
    for piece in x.split(300):
        found.add(piece)
    assert found.count == len(x)
    for index in range(0, BINS - 1, 5):
        low, high = edge(index), edge(index + 1)
        # A value within rounding of an edge may fall on either side.
        inside = ((x.abs() >= low * (1 + 1e-5)) & (x.abs() < high * (1 - 1e-5)) & (x > 0)).sum()
        around = ((x.abs() >= low * (1 - 1e-5)) & (x.abs() < high * (1 + 1e-5)) & (x > 0)).sum()
        assert inside <= found.positive[index] <= around
    assert found.zeros == (x.abs() < edge(0)).sum()
    assert found.negative.sum() == ((x < 0) & (x.abs() >= edge(0))).sum()


def test_what_is_beyond_the_bins_is_in_the_last_or_counts_as_zero():
    found = Histogram()
    found.add(torch.tensor([2.0**16.9, 2.0**17, 2.0**30, -(2.0**17), 2.0**-24.1, 2.0**-23.9]))
    assert (edge(len(found.positive)), edge(0)) == (2.0**17, 2.0**-24)
    assert [int(found.positive[-1]), int(found.negative[-1]), int(found.positive[0]), found.zeros] == [3, 1, 1, 1]


def test_quantiles_are_right_to_a_bin():
    torch.manual_seed(0)
    x = torch.randn(20000)
    found = Histogram()
    found.add(x)
    for share in (0.1, 0.5, 0.9, 0.999, 1.0):
        exact = float(x.abs().quantile(share))
        assert exact <= found.quantile(share) * (1 + 1e-5) and found.quantile(share) <= exact * 2 ** (1 / 4) * 1.001
    for magnitude in (0.1, 1.0, 3.0):
        assert found.share_below(magnitude) == pytest.approx(float((x.abs() <= magnitude).float().mean()), abs=0.02)
    assert found.share_below(1e9) == 1.0 and found.share_below(0) == 0.0
    assert float(x.min()) >= found.lowest >= float(x.min()) * 2 ** (1 / 4) * 1.001


def test_input_statistics_are_those_of_all_pieces():
    torch.manual_seed(0)
    pieces = [[torch.randn(2, 5, 6) * (step + 1) for _ in range(2)] for step in range(3)]
    found = InputStatistics()
    for step, of_step in enumerate(pieces):
        for x in of_step:
            found.add(x, step)
    whole = [torch.cat(of_step).flatten(0, 1) for of_step in pieces]
    everything = torch.cat(whole)
    assert found.amax == [float(x.abs().max()) for x in whole]
    assert found.rms == pytest.approx([float(x.square().mean().sqrt()) for x in whole])
    assert torch.equal(found.channel_amax, everything.abs().amax(0))
    assert torch.allclose(found.channel_rms, everything.square().mean(0).sqrt())
    assert found.tokens == 60 and found.values.count == 360 and found.token_amax.count == 60


def test_a_layer_that_skips_a_step_has_no_range_there():
    found = InputStatistics()
    found.add(torch.ones(1, 2), 0)
    found.add(2 * torch.ones(1, 2), 2)
    assert found.amax == [1.0, 0.0, 2.0] and found.rms == [1.0, 0.0, 2.0]


def test_outlier_channels_are_named_the_largest_first():
    x = torch.randn(50, 32).clamp(-2, 2)
    x[:, 5] *= 40
    x[:, 9] *= 400
    found = InputStatistics()
    found.add(x, 0)
    assert found.outlier_channels() == [9, 5]
    assert found.share_of_zeros() > 0.9


# Observation


def test_a_run_is_seen_from_its_first_step_to_its_last():
    model = tiny_model()
    before, seen = snapshot(model), {}
    handle = model.blocks[1].down.register_forward_hook(
        lambda module, args, output: seen.setdefault("x", []).append(args[0].detach().clone())
    )
    observation = observe_run(model, tiny_run(model, steps=4), progress=False)
    handle.remove()
    found = observation.inputs["blocks.1.down"]
    assert observation.steps == 4 and observation.not_called == []
    assert found.amax == [float(x.abs().max()) for x in seen["x"][-4:]]
    assert found.values.lowest == 0.0  # behind a ReLU
    assert unchanged(model, before) and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_is_kept_does_not_grow_with_the_steps():
    model = tiny_model()

    def kept(steps):
        found = observe_run(model, tiny_run(model, steps), progress=False).inputs["head"]
        tensors = [found.channel_amax, found.channel_square, found.values.positive, found.token_amax.negative]
        return [t.numel() for t in tensors], len(found.amax)

    assert kept(2) == (kept(9)[0], 2) and kept(9)[1] == 9


def test_attention_probabilities_are_the_models_own():
    model = tiny_dit()
    name, module = next(iter(attention_modules(model).items()))
    inputs = []
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    observation = observe_run(model, lambda: model(*dit_inputs()), progress=False)
    handle.remove()
    x = inputs[-1][:1]
    query, key = (part(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (module.to_q, module.to_k))
    exact = (query.detach() @ key.detach().transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    found = observation.attention[name]
    assert found.probabilities.count == exact.numel() and found.rows == exact.shape[1] * exact.shape[2]
    assert found.largest == pytest.approx(float(exact.amax(-1).sum()), rel=1e-4)


def test_attention_that_norms_its_queries_is_left_out():
    model = tiny_dit()
    module = next(iter(attention_modules(model).values()))
    module.norm_q = nn.LayerNorm(32)
    assert module not in attention_modules(model).values()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda model: lambda: None, "never called the TinyModel"),
        (lambda model: tiny_run(model, steps=3), "no multiple of calls_per_step = 2"),
    ],
)
def test_runs_that_cannot_be_analyzed_are_refused(run, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        observe_run(model, run(model), calls_per_step=2, progress=False)


def test_models_without_linear_layers_and_infinite_inputs_are_refused():
    with pytest.raises(ValueError, match="Conv2d has no unquantized linear layer"):
        observe_run(nn.Conv2d(1, 1, 1), lambda: None, progress=False)
    model = tiny_model()

    def run():
        for step in range(3):
            x, time = tiny_inputs(step)
            model(x * (float("inf") if step == 2 else 1.0), time)

    with pytest.raises(ValueError, match="input of embedder holds NaN or infinite values in step 2"):
        observe_run(model, run, progress=False)
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_k.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"attention transformer_blocks.0.attn1 holds NaN .* in step 0; analyze in a"):
        observe_run(model, lambda: model(*dit_inputs()), progress=False)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_is_a_position_in_the_run_whole_numbers_too(step):
    model = tiny_model()
    found = analyze(model, drawing(model), ["w8a8"], step=step, one_by_one=False, progress=False)
    assert found.step == 2 * step and found.losses


def test_layers_that_no_run_calls_are_refused():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    model = Aside()
    with pytest.raises(ValueError, match="called the Aside, but none of its linear layers"):
        analyze(model, lambda: model(torch.ones(1, 32)), ["w8a8"], progress=False)


# Weights


def test_weight_statistics_of_a_known_matrix():
    weight = torch.ones(4, 256)
    weight[:, 128:] = 0.25  # the second group uses two bits less of its channel's range
    weight[3] *= 8
    found = weight_statistics(weight)
    assert (found.amax, found.channel_spread, found.group_gain) == (8.0, 8.0, 1.0)
    weight[0] = 0  # a channel of zeros has no range
    assert weight_statistics(weight).group_gain == 1.0
    for bad, message in ((torch.zeros(2, 4), "zeros alone"), (torch.full((2, 4), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=message):
            weight_statistics(bad)


def test_decibels():
    assert signal_to_noise(100.0, 1.0) == pytest.approx(20.0)
    assert signal_to_noise(1.0, 0.0) == math.inf and signal_to_noise(0.0, 1.0) == -math.inf


# Sensitivity


def drawing(model, steps=3):
    def draw():
        with torch.no_grad():
            return torch.cat([model(*tiny_inputs(step)) for step in range(steps)])

    return draw


def test_the_noise_of_a_layers_output():
    model = tiny_model()
    draw = drawing(model)
    amax = {name: seen.amax[1] for name, seen in observe_run(model, draw, progress=False).inputs.items()}
    forms = forms_of(model, ["w8a8_static", "w4a16_g32"], amax)
    losses = output_losses(model, draw, forms, amax, step=1)
    layer, inputs = model.blocks[0].up, []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    draw()
    handle.remove()
    for scheme, reach in (("w8a8_static", amax["blocks.0.up"]), ("w4a16_g32", None)):
        exact = layer(inputs[1]).double()
        noise = QuantLinear.from_linear(layer, scheme, input_amax=reach)(inputs[1]).double() - exact
        expected = 10 * math.log10(float(exact.square().sum() / noise.square().sum()))
        assert losses["blocks.0.up"][scheme].snr_db == pytest.approx(expected, abs=1e-3)
    assert losses["blocks.0.up"]["w8a8_static"].snr_db > losses["blocks.0.up"]["w4a16_g32"].snr_db
    assert "embedder" in losses and "w4a16_g32" not in losses["embedder"]  # K = 4 is narrower than a group


def test_one_layer_at_a_time_and_the_model_as_before():
    model = tiny_model()
    draw, before = drawing(model), snapshot(model)
    forms = forms_of(model, ["w4a16"], {})
    losses = {name: {"w4a16": Loss(0.0)} for name in forms}
    found = draw_losses(model, draw, losses, forms, {}, progress=False)
    assert unchanged(model, before) and not any(isinstance(m, QuantLinear) for m in model.modules())
    other = copy.deepcopy(model)
    other.blocks[1].to_v = QuantLinear.from_linear(other.blocks[1].to_v, forms["blocks.1.to_v"]["w4a16"])
    expected = relative_error(drawing(other)(), draw())
    assert found["blocks.1.to_v"]["w4a16"].picture_error == pytest.approx(expected) and expected > 0


def test_modulations_are_tried_as_a_plan_would_have_them():
    forms = forms_of(small_dit(heads=4, head_dim=32), ["w4a8_g32"], {})
    assert forms["transformer_blocks.0.norm1.linear"] == {"w4a8_g32": "w4a16_g32"}
    assert forms["transformer_blocks.0.ff.net.2"] == {"w4a8_g32": "w4a8_g32"}


# The plan


def test_exceptions_hold_much_error_in_few_weights():
    model = small_dit(heads=4, head_dim=32)
    scheme = "w4a8_g32"
    forms = forms_of(model, [scheme], {})
    small, large = "transformer_blocks.0.attn1.to_v", "transformer_blocks.0.norm1.linear"
    losses = {name: {scheme: Loss(20.0, 0.001)} for name in forms}
    losses[small][scheme] = Loss(20.0, 0.01)
    chosen, exceptions = recommended_plan(model, scheme, losses, forms)
    assert exceptions == (small,) and chosen[small].scheme == "w8a8" and "squared error" in chosen[small].reason
    # As much error as weights is nothing to mend.
    weights = {entry.name: entry.weights for entry in chosen}
    losses = {name: {scheme: Loss(20.0, 1e-6 * weights[name] ** 0.5)} for name in forms}
    assert max(weights, key=weights.get) == large
    assert recommended_plan(model, scheme, losses, forms)[1] == ()
    # A layer that spoils the pictures is the first exception, and hides no other.
    losses[small][scheme], losses[large][scheme] = Loss(20.0, math.inf), Loss(20.0, 0.1)
    chosen, exceptions = recommended_plan(model, scheme, losses, forms)
    assert exceptions == (small, large) and chosen[small].reason == "alone it makes the pictures NaN or infinite"
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) == math.inf


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a8_g128", "w8a8"),
        ("w4a8_g128_static", "w8a8_static"),
        ("w4a16_g64", "w8a16_g128"),
        ("w8a8_static", "w8a16_g128"),
        ("w8a16_g128", None),
    ],
)
def test_the_next_gentler_scheme(scheme, expected):
    assert gentler(scheme) == expected


# The whole


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = small_dit(heads=4, head_dim=32)
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)

    def draw():
        with torch.no_grad():
            y = x
            for t in (900, 500, 100):
                y = y - 0.1 * model(y, timestep=torch.tensor([t, t]), class_labels=torch.tensor([0, 2])).sample
            return y

    return analyze(model, draw, ["w8a8_static", "w4a8_g32"], progress=False)


def test_the_page_needs_no_network_and_the_numbers_are_json(analysis, tmp_path):
    report.write(analysis, dict(source="a <model>"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(report.REPORT_FILES)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(report.SECTIONS)
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "a &lt;model&gt;" in page
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["steps"] == 3 and content["step"] == 1
    layer = content["losses"]["transformer_blocks.0.ff.net.2"]["w4a8_g32"]
    assert layer["picture_error"] > 0 and layer["snr_db"] > 0
    assert set(content["inputs"]) == set(content["weights"])
    with pytest.raises(FileExistsError, match="exists already"):
        report.write(analysis, {}, tmp_path / "out")


def test_a_report_that_fails_leaves_nothing(analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "as_html", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(analysis, {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_observed_step_is_the_position_asked_for(analysis):
    model = tiny_model()
    assert analyze(model, drawing(model, 5), ["w8a8"], step=1.0, one_by_one=False, progress=False).step == 4
    with pytest.raises(ValueError, match="step must lie"):
        analyze(model, drawing(model), step=1.5)
    with pytest.raises(ValueError, match="at least one scheme"):
        analyze(model, drawing(model), [])


def test_on_the_command_line(tmp_path, capsys):
    small_dit(heads=2, head_dim=64).save_pretrained(tmp_path / "model")
    quick = ("--samples", "1", "--steps", "3", "--trial-steps", "2", "--schemes", "w8a8", "w4a8_g128")
    arguments = ["analyze", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *quick]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "recommended for w4a8_g128" in printed and "Alone in w4a8_g128" in printed
    assert cli.main(arguments) == 2 and "exists already" in capsys.readouterr().err
    arguments[3] = str(tmp_path / "other")
    assert cli.main([*arguments, "--schemes", "w3a8"]) == 2 and "unknown scheme" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_layers_all_zero_have_no_range_and_no_loss():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].down.weight.zero_()
    found = analyze(model, drawing(model), ["w8a8"], progress=False)
    assert "blocks.0.down" not in found.weights and "blocks.0.down" not in found.losses


def test_errors_are_relative_and_squared_where_they_are_added():
    original = torch.tensor([3.0, 4.0])
    assert relative_error(original * 1.5, original) == pytest.approx(0.5)
    assert relative_error(original * 100, original * 50) == pytest.approx(1.0)
    losses = {"a": {"w8a8": Loss(20.0, 0.1), "w4a8": Loss(10.0)}}
    forms = {"a": {"w8a8": "w8a16", "w4a8": "w4a16"}}
    assert squared_errors(losses, forms) == {"a": {"w8a16": pytest.approx(0.01)}}
    # One layer with ten times the others' error has a hundred times their square.
    model, scheme = small_dit(heads=4, head_dim=32), "w4a8_g32"
    forms = forms_of(model, [scheme], {})
    losses = {name: {scheme: Loss(20.0, 0.1)} for name in forms}
    layer = "transformer_blocks.0.attn1.to_v"
    losses[layer][scheme] = Loss(20.0, 1.0)
    chosen, _ = recommended_plan(model, scheme, losses, forms)
    others = len(plan(model, scheme).quantized()) - 1
    share = 1.0 / (1.0 + others * 0.01)
    assert f"{share:.0%} of the pictures' squared error" in chosen[layer].reason


def test_calls_of_a_step_are_counted_as_asked():
    model = tiny_model()
    found = analyze(model, drawing(model, 6), ["w8a8"], step=0.5, calls_per_step=2, one_by_one=False, progress=False)
    assert (found.step, found.observation.steps) == (1, 3)
    forms, amax = found.forms, {}
    expected = output_losses(model, drawing(model, 6), forms, amax, 1, calls_per_step=2)
    assert found.losses == expected != output_losses(model, drawing(model, 6), forms, amax, 1)


def test_what_the_command_asks_for(tmp_path, monkeypatch):
    """The steps of the observed run, those of each trial, and the step that static scales are of."""
    small_dit(heads=2, head_dim=64).save_pretrained(tmp_path / "model")
    asked = {}

    def stop(model, draw, schemes, *, step, trial, one_by_one):
        asked.update(step=step, steps=draw(), trial=trial(), schemes=schemes, one_by_one=one_by_one)
        raise ValueError("enough")

    monkeypatch.setattr("ditq_kernels.analysis.analyze.analyze", stop)
    monkeypatch.setattr("ditq_kernels.integrations.sampling.sample", lambda *_, steps, **__: steps)
    arguments = ["analyze", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--schemes", "w8a8"]
    chosen = ["--steps", "9", "--step", "0.25", "--trial-steps", "4", "--no-trials"]
    assert cli.main([*arguments, *chosen]) == 2
    assert asked == dict(step=0.25, steps=9, trial=4, schemes=["w8a8"], one_by_one=False)
    assert cli.main([*arguments, "--steps", "3"]) == 2  # trials are no longer than the run
    assert asked == dict(step=DEFAULT_STEP, steps=3, trial=3, schemes=["w8a8"], one_by_one=True)
