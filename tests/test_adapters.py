"""Adapters by peft over quantized layers: attached before or after, merged and taken out again, nothing is lost."""

import pytest
import torch
from small_models import tiny_inputs, tiny_model, tiny_run
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.layer.linear import RequantizationWarning
from ditq_kernels.model.conversion import quantized_layers
from ditq_kernels.model.wrappers import own_name

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "up", "down"]
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
schemes = pytest.mark.parametrize("scheme", ["w8a8", "w8a16_g32", "w4a16_g32", "w4a8"])


def attach(model, seed=1, **options):
    """An adapter whose output is not nothing."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted.eval()


def attached_to(model, **options):
    return attach(ditq.quantize(model, options.pop("scheme"), progress=False), **options)


def decoded(adapted):
    """The same model with plain layers of the decoded weights under the same adapters."""
    for name, layer in quantized_layers(adapted).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        with torch.no_grad():
            plain.weight.copy_(layer.dequantized_weight())
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(adapted.get_submodule(parent), leaf, plain)
    return adapted


def output(model):
    with torch.no_grad():
        return model(*tiny_inputs())


def bits(model):
    return {name: [p.clone() for p in layer.parameters()] for name, layer in quantized_layers(model).items()}


def same(one, other):
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def distance(y, z):
    return float((y - z).norm() / z.norm())


@schemes
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_computes_over_the_decoded_weights(scheme, kind):
    adapted = attached_to(tiny_model(), scheme=scheme.replace("a8", "a16"), **kind)
    y = output(adapted)
    with adapted.disable_adapter():
        assert distance(output(adapted), y) > 1e-2, "the adapter says nothing"
    assert distance(y, output(decoded(adapted))) < 1e-5


@schemes
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_it_stays_and_unmerged_the_bits_come_back(scheme, kind, safe):
    adapted = attached_to(tiny_model(), scheme=scheme, **kind)
    before, beside = bits(adapted), output(adapted)
    with adapted.disable_adapter():
        without = output(adapted)
    with pytest.warns(RequantizationWarning, match="is lost"):
        adapted.merge_adapter(safe_merge=safe)
    merged = output(adapted)
    assert not same(before, bits(adapted))
    # As far from the adapter beside as another rounding is, which is small against what the adapter does.
    assert distance(merged, beside) < {"8": 0.02, "4": 0.25}[scheme[1]]
    assert scheme[1] == "4" or distance(merged, beside) < distance(without, beside) / 2
    adapted.unmerge_adapter()
    assert same(before, bits(adapted)) and torch.equal(output(adapted), beside)


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
def test_several_merged_one_after_another():
    adapted = attached_to(tiny_model(), scheme="w8a8")
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    before = bits(adapted)
    adapted.base_model.set_adapter(["default", "second"])
    beside = output(adapted)
    adapted.merge_adapter()
    assert distance(output(adapted), beside) < 0.05
    adapted.unmerge_adapter()
    assert same(before, bits(adapted)) and torch.equal(output(adapted), beside)


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
def test_merged_for_good():
    adapted = attached_to(tiny_model(), scheme="w8a8")
    beside = output(adapted)
    model = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in model.named_modules()) and quantized_layers(model)
    assert distance(output(model), beside) < 0.02


@pytest.mark.filterwarnings("ignore::ditq_kernels.layer.linear.RequantizationWarning")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_starts_that_take_their_part_out_of_the_weight(start):
    model = ditq.quantize(tiny_model(), "w8a16_g32", progress=False)
    before = output(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start)
    assert distance(output(peft.get_peft_model(model, config).eval()), before) < 0.02


@schemes
def test_a_model_with_adapters_is_quantized_under_them(scheme):
    plain = ditq.quantize(tiny_model(), scheme, progress=False)
    adapted = attach(tiny_model())
    ditq.quantize(adapted, scheme, progress=False)
    names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in quantized_layers(adapted)}
    assert names == quantized_layers(plain).keys()
    assert not any("lora" in name for name in quantized_layers(adapted))
    assert torch.equal(output(adapted), output(attach(plain)))


def test_a_plan_of_a_model_with_adapters_has_its_own_layers_only():
    chosen, plain = ditq.plan(attach(tiny_model()), "w4a8_g32"), ditq.plan(tiny_model(), "w4a8_g32")
    assert [(e.scheme, e.reason, e.in_features) for e in chosen] == [(e.scheme, e.reason, e.in_features) for e in plain]


def test_adapters_are_not_calibrated_for():
    adapted = attach(tiny_model())
    calibration = ditq.calibrate(adapted, tiny_run(adapted), moments=True)
    assert {*calibration.amax} == {*calibration.moments} == {entry.name for entry in ditq.plan(adapted, "w8a8")}
    ditq.quantize(adapted, "w8a8_static", calibration, progress=False)
    assert sum(layer.scheme.static for layer in quantized_layers(adapted).values()) == 2 * len(TARGETS)


def test_steps_of_a_model_with_adapters_are_counted():
    adapted = attach(tiny_model())

    def run():
        for step in range(3):
            for _ in range(2):  # guidance
                adapted(*tiny_inputs(step))

    assert ditq.calibrate(adapted, run, 0.5).steps == 3


def test_an_adapter_is_trained_over_a_frozen_quantized_model():
    adapted = attached_to(tiny_model(), scheme="w4a16_g32").train()
    before, target = bits(adapted), torch.zeros(2, 5, 4)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (adapted(*tiny_inputs()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and same(before, bits(adapted))


def test_a_quantized_model_is_not_quantized_again():
    model = ditq.quantize(tiny_model(), "w8a8", progress=False)
    before = bits(model)
    with pytest.raises(ValueError, match=r"quantized already .*to w8a16.*ditq\.plan\(model"):
        ditq.quantize(model, "w4a8", progress=False)
    assert same(before, bits(model))
    rest = ditq.plan(model, "w4a16")
    rest["head"] = "w8a16"
    ditq.quantize(model, rest, progress=False)
    assert quantized_layers(model)["head"].scheme.name == "w8a16"


def test_a_calibration_fits_a_model_that_has_got_adapters_since():
    plain, adapted = tiny_model(), attach(tiny_model()).get_base_model()
    calibration = ditq.calibrate(plain, tiny_run(plain), 0, moments=True)
    ditq.plan(adapted, budget_bits=6, calibration=calibration)
    for model in (plain, adapted):
        ditq.quantize(model, "w4a8_g32_static", calibration, "compensated", progress=False)
    expected = {own_name(name): layer for name, layer in quantized_layers(plain).items()}
    found = {own_name(name): layer for name, layer in quantized_layers(adapted).items()}
    assert found.keys() == expected.keys() != set()
    for name, layer in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), found[name].parameters(), strict=True)), name
