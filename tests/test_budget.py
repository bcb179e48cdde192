"""Bits under a budget: the best allocation there is, and plans that keep to theirs."""

from itertools import product

import pytest
import torch
from small_models import tiny_model
from small_sources import small_dit

import ditq_kernels as ditq
from ditq_kernels.analysis.analyze import analyze
from ditq_kernels.integrations.sampling import default_scheduler, sample
from ditq_kernels.layer.formats import Scheme
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.model.budget import Option, allocate, alternatives, rounding_error


def options_of(generator, layers, counts=(2, 3, 4)):
    """Random options, larger ones not always better."""
    found = {}
    for index in range(layers):
        count = counts[index % len(counts)]
        bits = torch.randint(10, 100, (count,), generator=generator).tolist()
        errors = torch.rand(count, generator=generator).tolist()
        found[f"layer{index}"] = [Option(f"s{i}", b, e) for i, (b, e) in enumerate(zip(bits, errors, strict=True))]
    return found


def lower_hull(points):
    """The vertices of the lower convex hull of (bits, error), by ascending bits, down to the least error."""
    hull = []
    for bits, error in sorted(points):
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1 and (error - hull[-2][1]) * (hull[-1][0] - hull[-2][0]) <= (hull[-1][1] - hull[-2][1]) * (
            bits - hull[-2][0]
        ):
            hull.pop()
        hull.append((bits, error))
    return hull


@pytest.mark.parametrize("seed", range(20))
def test_no_allocation_of_the_same_size_makes_less_error(seed):
    """Where the budget is a vertex of the convex hull of all combinations, that vertex is chosen; between two, what is
    chosen is at least as good as the one before.
    """
    options = options_of(torch.Generator().manual_seed(seed), 6)
    every = [(sum(o.bits for o in c), sum(o.error for o in c)) for c in product(*options.values())]
    hull = lower_hull(every)
    assert len(hull) > 1
    for (bits, error), (following, _) in zip(hull, [*hull[1:], (hull[-1][0] + 9, 0)], strict=True):
        for budget in (bits, following - 1):
            chosen = allocate(options, budget).values()
            assert sum(o.bits for o in chosen) <= budget
            found = sum(o.error for o in chosen)
            assert found == pytest.approx(error) if budget == bits else found <= error + 1e-9


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


def test_the_errors_of_an_analysis():
    """Layers that move the pictures most get more bits than the plan gives by the weights' noise."""
    model = dit()

    def draw():
        return sample(model, default_scheduler(), [0], [0], steps=2, progress=False)

    found = analyze(model, draw, alternatives(Scheme.parse("w4a16_g128")), progress=False)
    chosen = ditq.plan(model, "w4a16_g128", budget_bits=4.8, errors=found.errors())

    def total(plan):
        return sum(found.errors()[entry.name][entry.scheme] for entry in plan.quantized())

    assert stored_bits(chosen) <= 4.8 and total(chosen) < total(ditq.plan(model, "w4a16_g128", budget_bits=4.8))


def test_a_calibration_weighs_the_inputs():
    """A weight whose noise lies in columns that are fed nothing makes no error."""
    layer = torch.nn.Linear(64, 32)
    moment = torch.zeros(64, 64)
    assert rounding_error(layer, "w4a8_g32") > 0
    assert rounding_error(layer, "w4a8_g32", moment) == 0
    assert rounding_error(layer, "w4a8_g32", torch.eye(64)) == pytest.approx(rounding_error(layer, "w4a8_g32"))
    assert rounding_error(layer, "w8a8") < rounding_error(layer, "w4a8_g32")
    # Of two columns the noise of one, and what both make of each other.
    seen = torch.zeros(64, 64)
    seen[3, 3] = 2.0
    exact = layer.weight.detach()
    noise = QuantLinear.from_linear(layer, "w4a16_g32").dequantized_weight() - exact
    expected = float(noise[:, 3].square().sum() / exact[:, 3].square().sum())
    assert rounding_error(layer, "w4a8_g32", seen) == pytest.approx(expected, rel=1e-4)
    model = dit()
    calibration = calibrated(model, moments=True)
    chosen = ditq.plan(model, budget_bits=5, calibration=calibration)
    assert stored_bits(chosen) <= 5


def test_a_budget_goes_where_the_calibration_says():
    """A layer that is fed nothing makes no error, however coarse."""
    model = dit()
    calibration = calibrated(model, moments=True)
    unfed = "transformer_blocks.0.attn1.to_out.0"
    assert ditq.plan(model, "w4a8_g128", budget_bits=6)[unfed].scheme != "w4a8_g128"
    calibration.moments[unfed] = torch.zeros_like(calibration.moments[unfed])
    chosen = ditq.plan(model, "w4a8_g128", budget_bits=6, calibration=calibration)
    assert chosen[unfed].scheme == "w4a8_g128" and stored_bits(chosen) > 5


def test_refusals():
    model = dit()
    with pytest.raises(ValueError, match=r"no plan has 3 bits per weight; the smallest formats take 4\.\d\d"):
        ditq.plan(model, budget_bits=3)
    with pytest.raises(ValueError, match="give budget_bits too"):
        ditq.plan(model, errors={})
    with pytest.raises(ValueError, match="calibrate with moments=True"):
        ditq.plan(model, budget_bits=5, calibration=calibrated(model))
    for budget in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget_bits must be a number of bits"):
            ditq.plan(model, budget_bits=budget)
    partly = calibrated(model, moments=["*to_q"])
    with pytest.raises(ValueError, match=r"has no second moments of transformer_blocks\.0\.norm1\.linear"):
        ditq.plan(model, budget_bits=5, calibration=partly)
    with pytest.raises(ValueError, match="give one of the two"):
        ditq.plan(model, budget_bits=5, calibration=partly, errors={})
    with pytest.raises(ValueError, match="calibration was taken on another model"):
        ditq.plan(tiny_model(), budget_bits=5, calibration=partly)
    with pytest.raises(ValueError, match=r"errors has no w4a16_g128 for transformer_blocks\.0\.norm1\.linear"):
        ditq.plan(model, budget_bits=5, errors={})
