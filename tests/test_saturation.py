"""What static schemes meet beyond their calibrated ranges: counted as by hand, warned of, and no trace left."""

import warnings

import pytest
import torch
from small_models import tiny_inputs, tiny_model, tiny_run
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.model.conversion import quantized_layers


def static_model(scheme="w8a8_static", step=0, **options):
    """A model that is calibrated on one step of :func:`tiny_run`."""
    model = tiny_model()
    calibration = ditq.calibrate(model, tiny_run(model), step, **options)
    return ditq.quantize(model, scheme, calibration, progress=False)


def scaled_run(model, factor, steps=1):
    def run():
        with torch.no_grad():
            for step in range(steps):
                x, time = tiny_inputs(step)
                model(factor * x, time)

    return run


def by_hand(model, run):
    """Share and overshoot of every static layer, from all inputs that hooks of the test's own keep."""
    inputs = {}
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.input_amax is not None}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].clone()))
        for name, layer in layers.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    magnitudes = {name: torch.cat([x.flatten() for x in seen]).abs() for name, seen in inputs.items()}
    amax = {name: layers[name].input_amax.item() for name in inputs}
    share = {name: (m > amax[name]).double().mean().item() for name, m in magnitudes.items()}
    return share, {name: m.max().item() / amax[name] for name, m in magnitudes.items()}


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ditq.saturation(*args, **options)


@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a8_g32_static"])
def test_it_is_what_is_counted_by_hand(scheme):
    model = static_model(scheme)
    run = scaled_run(model, 3.0, steps=2)
    found = quietly(model, run, warn_above=None)
    share, overshoot = by_hand(model, run)
    assert max(share.values()) > 0.05 and len(share) == 10  # the modulations take 16-bit activations
    assert (found.share, found.overshoot, found.not_called) == (pytest.approx(share), pytest.approx(overshoot), [])
    assert found.worst()[0] == max(share, key=share.get)


def test_what_was_calibrated_on_does_not_saturate():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    alone = nn.Sequential(nn.Linear(8, 8))
    calibration = ditq.calibrate(alone, lambda: alone(x), 0)
    plan = ditq.plan(alone, "w8a8_static", calibration=calibration)
    plan["0"] = "w8a8_static"
    ditq.quantize(alone, plan, calibration, progress=False)
    found = quietly(alone, lambda: alone(x), warn_above=0.0)
    assert (found.share, found.overshoot) == ({"0": 0.0}, {"0": 1.0})
    # In a deeper model, later layers are fed what quantized ones before them computed.
    model = static_model()
    found = quietly(model, scaled_run(model, 1.0), warn_above=0.02)
    assert all(reach < 1.05 for reach in found.overshoot.values())


def test_a_share_above_the_stated_one_is_warned_of_and_no_other():
    x = torch.arange(1.0, 101.0).view(1, 100)
    model = nn.Sequential(ditq.QuantLinear.from_linear(nn.Linear(100, 4), "w8a8_static", input_amax=95.0))
    run = lambda: model(x)  # noqa: E731
    assert quietly(model, run, warn_above=0.05).share == {"0": 0.05}
    with pytest.warns(ditq.SaturationWarning, match=r"1 of 1 .* worst is 0 with 5\.00%, up to 1\.05 times.*to w8a8,"):
        assert ditq.saturation(model, run, warn_above=0.049).above(0.049) == ["0"]
    with pytest.warns(ditq.SaturationWarning):
        ditq.saturation(model, run)
    assert not quietly(model, run, warn_above=None).above(0.05)


def test_one_step_is_one_step():
    model = static_model()
    before = model.forwards
    found = quietly(model, tiny_run(model), -1, warn_above=None)
    assert model.forwards == before + 1 + 5  # one to count the steps, and the run
    share, _ = by_hand(model, lambda: model(*tiny_inputs(4)))
    assert found.share == pytest.approx(share)
    whole = quietly(model, tiny_run(model), warn_above=None)
    assert all(whole.overshoot[name] >= reach for name, reach in found.overshoot.items())


def test_layers_that_are_not_called_are_listed():
    model = nn.ModuleDict({name: ditq.QuantLinear.from_linear(nn.Linear(4, 4), "w8a8_static", 1.0) for name in "ab"})
    model.forward = lambda x: model["a"](x)
    found = quietly(model, lambda: model(torch.ones(2, 4)))
    assert (found.share, found.not_called) == ({"a": 0.0}, ["b"])


def test_the_table_has_the_worst_first_and_what_was_not_called():
    found = ditq.Saturation(
        {f"layer{i}": i / 1000 for i in range(14)}, {f"layer{i}": 0.5 + i / 10 for i in range(14)}, ["idle"]
    )
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "beyond", "range", "largest", "/", "range"]
    assert lines[1].split() == ["layer13", "1.300%", "1.80"]
    assert lines[-2:] == ["and 4 more layers, none of them worse", "not called: idle"]
    assert len(found.table(None).splitlines()) == 1 + 14 + 1


@pytest.mark.parametrize("attached", [False, True])
def test_names_are_the_bare_models(attached):
    model = static_model()
    names = {name for name, layer in quantized_layers(model).items() if layer.scheme.static}
    run = scaled_run(model, 2.0)
    expected = quietly(model, run, warn_above=None)
    if attached:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "up"]))
    else:
        wrapped = torch.compile(model)
    found = quietly(wrapped, scaled_run(wrapped, 2.0), warn_above=None)
    assert found.share == expected.share and names == found.share.keys()


def test_calls_add_up_empty_ones_and_inference_mode_included():
    model = nn.Sequential(ditq.QuantLinear.from_linear(nn.Linear(4, 4), "w8a8_static", input_amax=1.0))

    @torch.inference_mode()
    def run():
        model(torch.zeros(0, 4))
        model(torch.tensor([[2.0, 0.5, 0.5, -3.0]]))
        model(torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16))

    found = quietly(model, run, warn_above=None)
    assert (found.share, found.overshoot) == ({"0": 0.25}, {"0": 3.0})


def test_no_trace_is_left_even_of_a_run_that_fails():
    model = static_model()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fails():
        model(*tiny_inputs())
        assert hooks() > 0
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ditq.saturation(model, fails)
    assert hooks() == 0
    quietly(model, tiny_run(model), warn_above=None)
    assert hooks() == 0


def test_errors_name_what_is_at_fault():
    model = static_model()
    run = tiny_run(model)
    dynamic = ditq.quantize(tiny_model(), "w8a8", progress=False)
    with pytest.raises(ValueError, match=r"TinyModel has no layer with a calibrated range.*w8a8_static first"):
        ditq.saturation(dynamic, run)
    with pytest.raises(ValueError, match="has no layer with a calibrated range"):
        ditq.saturation(tiny_model(), run)
    with pytest.raises(TypeError, match="of a pipeline, give its transformer"):
        ditq.saturation(object(), run)
    with pytest.raises(TypeError, match="run must be callable"):
        ditq.saturation(model, None)
    with pytest.raises(ValueError, match="never called the TinyModel"):
        ditq.saturation(model, lambda: None)
    with pytest.raises(ValueError, match="beyond the run"):
        ditq.saturation(model, run, 9)
    with pytest.raises(ValueError, match="warn_above must be a share"):
        ditq.saturation(model, run, warn_above=5)
    with pytest.raises(ValueError, match=r"range of blocks\.0\.to_q is on the meta device"):
        ditq.saturation(static_model().to("meta"), run)
