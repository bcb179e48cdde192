"""Bits under a budget: the best allocation there is, and plans that keep to theirs."""

from itertools import product

import pytest
import torch
from small_sources import small_dit

import ditq_kernels as ditq
from ditq_kernels.budget import Option, allocate, rounding_error
from ditq_kernels.formats import Scheme
from ditq_kernels.integrations.sampling import default_scheduler, sample


def options_of(generator, layers, counts=(2, 3, 4)):
    """Random options, larger ones not always better."""
    found = {}
    for index in range(layers):
        count = counts[index % len(counts)]
        bits = torch.randint(10, 100, (count,), generator=generator).tolist()
        errors = torch.rand(count, generator=generator).tolist()
        found[f"layer{index}"] = [Option(f"s{i}", b, e) for i, (b, e) in enumerate(zip(bits, errors, strict=True))]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_allocation_of_the_same_size_makes_less_error(seed):
    """Among all combinations, none that is as small as what was chosen is better."""
    options = options_of(torch.Generator().manual_seed(seed), 5)
    least = sum(min(option.bits for option in of_layer) for of_layer in options.values())
    most = sum(max(option.bits for option in of_layer) for of_layer in options.values())
    for budget in (least, (least + most) // 2, most):
        chosen = allocate(options, budget)
        bits, error = (sum(getattr(option, what) for option in chosen.values()) for what in ("bits", "error"))
        assert bits <= budget
        every = list(product(*options.values()))
        within = min(sum(o.error for o in c) for c in every if sum(o.bits for o in c) <= budget)
        # Steps along the convex hulls may leave a rest of the budget that no whole step fits into.
        steepest = max(o.error for of_layer in options.values() for o in of_layer)
        assert within <= error <= within + steepest
        if budget == most:
            assert error == pytest.approx(within)


def test_an_option_that_is_larger_and_worse_is_never_taken():
    chosen = allocate({"a": [Option("small", 10, 1.0), Option("bad", 20, 2.0), Option("large", 30, 0.5)]}, 100)
    assert chosen["a"].scheme == "large"
    assert allocate({"a": [Option("small", 10, 1.0), Option("bad", 20, 2.0)]}, 100)["a"].scheme == "small"


def dit():
    return small_dit(heads=4, head_dim=32)


def calibrated(model, **how):
    return ditq.calibrate(
        model, lambda: sample(model, default_scheduler(), [0, 1], [0, 1], steps=2, progress=False), 0, **how
    )


def stored_bits(plan):
    return sum(e.stored_bits for e in plan.quantized()) / sum(e.weights for e in plan.quantized())


@pytest.mark.parametrize("budget", [4.6, 5.0, 6.0])
def test_a_plan_keeps_to_its_budget_and_uses_it(budget):
    model = dit()
    chosen = ditq.plan(model, budget_bits=budget)
    assert budget - 0.5 < stored_bits(chosen) <= budget
    schemes = {entry.scheme for entry in chosen.quantized()}
    assert len(schemes) > 1 and all("by budget" in entry.reason for entry in chosen.quantized())
    assert {Scheme.parse(e.scheme).activation.bits for e in chosen.quantized() if "to_q" in e.name} == {8}
    assert chosen["proj_out_2"].scheme is None
    quantized = ditq.quantize(model, chosen, progress=False)
    assert quantized.transformer_blocks[0].attn1.to_q.scheme.name == chosen["transformer_blocks.0.attn1.to_q"].scheme


def test_errors_that_are_given_decide():
    model = dit()
    names = [entry.name for entry in ditq.plan(model, "w4a16_g128").quantized()]
    errors = {name: dict(w4a16_g128=1.0, w4a16_g64=1.0, w4a16_g32=1.0, w8a16=1.0) for name in names}
    errors[names[0]]["w8a16"] = 0.0
    chosen = ditq.plan(model, "w4a16_g128", budget_bits=7, errors=errors)
    assert {entry.name: entry.scheme for entry in chosen.quantized()} == {
        name: "w8a16" if name == names[0] else "w4a16_g128" for name in names
    }


def test_a_calibration_weighs_the_inputs():
    """A weight whose noise lies in columns that are fed nothing makes no error."""
    layer = torch.nn.Linear(64, 32)
    moment = torch.zeros(64, 64)
    assert rounding_error(layer, "w4a8_g32") > 0
    assert rounding_error(layer, "w4a8_g32", moment) == 0
    assert rounding_error(layer, "w4a8_g32", torch.eye(64)) == pytest.approx(rounding_error(layer, "w4a8_g32"))
    assert rounding_error(layer, "w8a8") < rounding_error(layer, "w4a8_g32")
    model = dit()
    calibration = calibrated(model, moments=True)
    chosen = ditq.plan(model, budget_bits=5, calibration=calibration)
    assert stored_bits(chosen) <= 5


def test_refusals():
    model = dit()
    with pytest.raises(ValueError, match=r"no plan has 3 bits per weight; the smallest formats take 4\.\d\d"):
        ditq.plan(model, budget_bits=3)
    with pytest.raises(ValueError, match="give budget_bits too"):
        ditq.plan(model, errors={})
    with pytest.raises(ValueError, match="calibrate with moments=True"):
        ditq.plan(model, budget_bits=5, calibration=calibrated(model))
    with pytest.raises(ValueError, match=r"errors has no w4a16_g128 for transformer_blocks\.0\.norm1\.linear"):
        ditq.plan(model, budget_bits=5, errors={})
