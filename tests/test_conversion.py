"""Conversion does what the plan says, or nothing."""

import weakref

import pytest
import torch
from small_models import dit_inputs, snapshot, tiny_dit, tiny_inputs, tiny_model, tiny_run, unchanged
from torch import nn

from ditq_kernels.checkpoint.store import load, save
from ditq_kernels.layer.compensation import compensation_bytes
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.memory import MemoryWarning
from ditq_kernels.model.calibration import calibrate
from ditq_kernels.model.conversion import quantize, quantized_layers
from ditq_kernels.model.observation import linear_layers
from ditq_kernels.model.planning import plan


def test_quantize_follows_the_plan():
    model, original = tiny_dit(), tiny_dit()
    chosen = plan(model, "w4a8_g32")
    chosen["transformer_blocks.1.attn1.to_q"] = "w8a8"
    assert quantize(model, chosen, progress=False) is model
    layers = quantized_layers(model)
    assert {name: str(layer.scheme) for name, layer in layers.items()} == {
        entry.name: entry.scheme for entry in chosen.quantized()
    }
    for name, layer in layers.items():
        alone = QuantLinear.from_linear(original.get_submodule(name), layer.scheme)
        assert torch.equal(layer.dequantized_weight(), alone.dequantized_weight())
        assert torch.equal(layer.bias, alone.bias) and not layer.training
    kept = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert kept == [entry.name for entry in chosen if entry.scheme is None]
    assert model(*dit_inputs()).sample.isfinite().all()


def test_static_and_compensated_use_the_calibration():
    model, original = tiny_model(), tiny_model()
    calibration = calibrate(model, tiny_run(model), 0.5, moments=True)
    moments = {name: moment.clone() for name, moment in calibration.moments.items()}
    quantize(model, "w4a8_g32_static", calibration, rounding="compensated", clip=0.9, progress=False)
    for name, layer in quantized_layers(model).items():
        alone = QuantLinear.from_linear(
            original.get_submodule(name), layer.scheme, calibration.amax[name], calibration.moments[name], clip=0.9
        )
        assert torch.equal(layer.dequantized_weight(), alone.dequantized_weight())
        assert layer.input_amax is None or torch.equal(layer.input_amax, alone.input_amax)
    assert layer.scheme.static
    assert all(torch.equal(moments[name], calibration.moments[name]) for name in moments)  # the caller's, untouched


def test_no_16_bit_weight_stays_reachable_even_during_conversion(monkeypatch):
    model = tiny_dit()
    chosen = plan(model, "w4a8_g32")
    weights = {entry.name: weakref.ref(model.get_submodule(entry.name).weight) for entry in chosen.quantized()}
    order, alive = list(weights), []
    convert = QuantLinear.from_linear.__func__

    def watched(cls, linear, *args, **kwargs):
        alive.append([name for name in order if weights[name]() is not None])
        return convert(cls, linear, *args, **kwargs)

    monkeypatch.setattr(QuantLinear, "from_linear", classmethod(watched))
    quantize(model, chosen, progress=False)
    assert alive == [order[i:] for i in range(len(order))]
    assert [name for name in order if weights[name]() is not None] == []


def test_a_layer_with_two_names_is_replaced_under_both():
    model = tiny_model()
    model.blocks[1].to_q = model.blocks[0].to_q
    quantize(model, "w8a8", progress=False)
    assert isinstance(model.blocks[0].to_q, QuantLinear)
    assert model.blocks[1].to_q is model.blocks[0].to_q


def refuses(match, scheme_or_plan="w8a8", model=None, kind=ValueError, **arguments):
    model = model or tiny_model()
    modules, before = dict(model.named_modules()), snapshot(model)
    with pytest.raises(kind, match=match):
        quantize(model, scheme_or_plan, progress=False, **arguments)
    assert dict(model.named_modules()) == modules and not quantized_layers(model)
    assert unchanged(model, before)


def test_errors_leave_the_model_as_it_was():
    model = tiny_model()
    calibration = calibrate(model, tiny_run(model), 0, moments=["blocks.0.*"])
    refuses("unknown scheme 'w5a5'", "w5a5")
    refuses("unknown rounding 'up'", rounding="up")
    refuses("clip must be", clip=2.0)
    refuses("needs second moments", rounding="compensated")
    refuses(r"no second moment of blocks\.1\.modulation", rounding="compensated", calibration=calibration)
    refuses(r"w8a8_static needs calibration=.*; w8a8 needs none", "w8a8_static")
    refuses("calibration must come from ditq.calibrate, got dict", calibration={}, kind=TypeError)
    refuses("has no unquantized linear layer", model=nn.Sequential(nn.ReLU()))
    wide = tiny_model(width=64)
    refuses("the calibration was taken on another model", model=wide, calibration=calibration)
    refuses("embedder is 4 -> 64, the plan says 4 -> 32", plan(model, "w8a8"), model=wide)
    refuses("DiTTransformer2DModel has no linear layer embedder", plan(model, "w8a8"), model=tiny_dit())
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        quantize("pipeline", "w8a8")
    with pytest.raises(ValueError, match=r"QuantLinear\.from_linear"):
        quantize(nn.Linear(4, 4), "w8a8")


def test_calibration_that_lacks_a_layer_or_saw_only_zeros():
    model = tiny_model()
    calibration = calibrate(model, tiny_run(model), 0, moments=True)
    calibration.amax["blocks.1.down"] = 0.0
    refuses(r"amax = 0\.0 for blocks\.1\.down", "w8a8_static", calibration=calibration)
    del calibration.amax["blocks.1.down"]
    refuses(r"never called blocks\.1\.down", "w8a8_static", calibration=calibration)
    quantize(tiny_model(), "w8a8", calibration, progress=False)  # a dynamic scheme does not need it
    calibration.moments["blocks.0.up"] = torch.full((32, 32), float("nan"))
    refuses(r"second moment of blocks\.0\.up must be a finite", rounding="compensated", calibration=calibration)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = bad
    chosen = plan(model, "w8a8")
    refuses(r"the weight of blocks\.1\.down holds NaN or infinite", model=model)
    chosen["blocks.1.down"] = None
    quantize(model, chosen, progress=False)  # it is kept: no concern


def test_hooks_offloaded_weights_and_quantized_layers():
    model = tiny_model()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    refuses(r"blocks\.0\.up has forward hooks", model=model)
    model = tiny_model()
    model.blocks[1].up.register_forward_pre_hook(lambda *_: None)
    refuses(r"blocks\.1\.up has forward hooks", model=model)
    model = tiny_model()
    model.blocks[1].down.forward = lambda x: x
    refuses(r"blocks\.1\.down has", model=model)
    with torch.device("meta"):
        offloaded = tiny_model()
    with pytest.raises(ValueError, match="is on the meta device"):
        quantize(offloaded, "w8a8", progress=False)
    assert not quantized_layers(offloaded)
    model = tiny_model()
    chosen = plan(model, "w8a8")
    quantize(model, chosen, progress=False)
    output = model(*tiny_inputs())
    with pytest.raises(ValueError, match=r"blocks\.0\.modulation is quantized already"):
        quantize(model, chosen, progress=False)
    assert torch.equal(model(*tiny_inputs()), output)


def test_progress_is_shown_and_can_be_switched_off(capsys):
    quantize(tiny_model(), "w8a8", progress=False)
    assert capsys.readouterr().err == ""
    quantize(tiny_model(), "w8a8")
    assert "/12 [" in capsys.readouterr().err


def test_a_compiled_model_is_quantized_and_saved_as_itself(tmp_path):
    compiled, plain = torch.compile(tiny_dit(), backend="eager"), tiny_dit()
    x, time, labels = dit_inputs()

    def run(model=compiled):
        with torch.no_grad():
            return model(x, timestep=time, class_labels=labels).sample

    run()
    calibration = calibrate(compiled, run, 0.0)
    assert set(calibration.amax) <= {entry.name for entry in plan(compiled, "w8a8")}
    assert [(e.scheme, e.reason) for e in plan(compiled)] == [(e.scheme, e.reason) for e in plan(plain)]
    quantize(compiled, "w8a8_static", calibration, progress=False)
    quantize(plain, "w8a8_static", calibrate(plain, lambda: run(plain), 0.0), progress=False)
    assert torch.equal(run(), run(plain))
    save(compiled, tmp_path / "saved")
    assert torch.equal(run(load(tmp_path / "saved")), run(plain))


def test_compensation_that_may_not_fit_is_said_before_a_layer_changes(monkeypatch):
    model = tiny_model()
    calibration = calibrate(model, tiny_run(model), 0, moments=True)
    widest = max(layer.in_features for layer in linear_layers(model).values())
    monkeypatch.setattr("ditq_kernels.memory.available_bytes", lambda: compensation_bytes(widest) - 1)
    with pytest.warns(MemoryWarning, match="compensated rounding of .* takes up to .* round to nearest") as said:
        quantize(model, "w4a8_g32", calibration, rounding="compensated", progress=False)
    assert said[0].filename == __file__
