"""Which steps of a run are observed: indices, fractions, several, and what calls make one step."""

import re

import pytest
import torch
from small_models import hook_count, inputs_at, tiny_inputs, tiny_model, tiny_run

from ditq_kernels.model.calibration import (
    DEFAULT_MOMENT_STEPS,
    DEFAULT_STEP,
    calibrate,
)
from ditq_kernels.model.chosen_steps import step_index
from ditq_kernels.model.observation import second_moment


@pytest.mark.parametrize(("step", "index"), [(0, 0), (3, 3), (-1, 4), (-5, 0), (0.0, 0), (0.5, 2), (0.99, 4), (1.0, 4)])
def test_observes_the_chosen_step_and_nothing_else(step, index):
    model = tiny_model()
    result = calibrate(model, tiny_run(model), step)
    expected = {name: float(x.abs().max()) for name, x in inputs_at(model, index).items()}
    assert (result.step, result.amax) == (index, expected)
    assert result.tokens == {name: 2 if "modulation" in name else 10 for name in expected}
    assert result.steps == (None if isinstance(step, int) and step >= 0 else 5)


def test_the_run_ends_after_the_observed_step():
    model = tiny_model()
    calibrate(model, tiny_run(model), 1)
    assert model.forwards == 2


def test_counting_costs_one_forward():
    model = tiny_model()
    calibrate(model, tiny_run(model, steps=40), 0.5)
    assert model.forwards == 1 + 21  # the one that is replayed, and the run up to step 20


def test_counting_runs_anew_where_shapes_change():
    model = tiny_model()

    def run():
        for step in range(4):
            x, time = tiny_inputs(step)
            batch = 2 if step < 2 else 1  # guidance for a part of the run
            assert model(x[:batch], time[:batch]).shape[0] == batch

    assert calibrate(model, run, -1).steps == 4


def test_two_calls_make_one_step():
    model = tiny_model()
    result = calibrate(model, tiny_run(model, steps=6), 1, moments=["blocks.0.*"], calls_per_step=2)
    first, second = inputs_at(model, 2), inputs_at(model, 3)
    assert result.amax == {name: max(float(first[name].abs().max()), float(second[name].abs().max())) for name in first}
    assert set(result.tokens.values()) == {4, 20}
    for name, moment in result.moments.items():
        assert torch.equal(moment, second_moment(first[name]) + second_moment(second[name]))
    assert result.moments["blocks.0.to_q"] is result.moments["blocks.0.to_v"]


@pytest.mark.parametrize("steps", [(1, 3), (3, 1), (0.2, 0.7), (0.7, -4), [3, 1, 2]])
def test_moments_of_several_steps_and_ranges_of_the_first(steps):
    model = tiny_model()
    counted = any(isinstance(step, float) or step < 0 for step in steps)
    result = calibrate(model, tiny_run(model), steps, moments=True)
    of = {0.2: 1, 0.7: 3, -4: 1}
    indices = tuple(of.get(step, step) for step in steps)
    seen = {index: inputs_at(model, index) for index in indices}
    assert (result.step, result.moment_steps, result.steps) == (indices[0], indices, 5 if counted else None)
    assert result.amax == {name: float(x.abs().max()) for name, x in seen[indices[0]].items()}
    for name, channels in result.channel_amax.items():
        assert torch.equal(channels, seen[indices[0]][name].abs().flatten(0, -2).amax(0))
    for name, moment in result.moments.items():
        assert torch.equal(moment, sum(second_moment(seen[index][name]) for index in sorted(indices)))
        assert result.tokens[name] == len(indices) * (2 if "modulation" in name else 10)
    assert result.observed == indices
    again = calibrate(model, tiny_run(model), result.observed, moments=True)
    assert again.amax == result.amax and all(torch.equal(again.moments[n], m) for n, m in result.moments.items())


def test_several_steps_are_one_run_that_ends_behind_the_last():
    model = tiny_model()
    calibrate(model, tiny_run(model, steps=40), (0.2, 0.1), moments=True)
    assert model.forwards == 1 + 9  # counted by one, and up to step 8
    model = tiny_model()
    result = calibrate(model, tiny_run(model, steps=40), (0.2, 0.5))
    assert model.forwards == 1 + 9 and result.moment_steps == (), (
        "without moments the first step is all there is to see"
    )


def test_the_defaults():
    model = tiny_model()
    ranges, moments = calibrate(model, tiny_run(model)), calibrate(model, tiny_run(model), moments=True)
    assert (ranges.step, ranges.moment_steps) == (step_index(DEFAULT_STEP, 5), ())
    assert moments.moment_steps == tuple(step_index(step, 5) for step in DEFAULT_MOMENT_STEPS)
    only = calibrate(model, tiny_run(model, steps=1), moments=True)  # where both are the same step
    assert (only.step, only.moment_steps, only.tokens["blocks.0.to_q"]) == (0, (), 10)


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        ((0.4, 0.41), ValueError, "0.4 and 0.41 are both step 2 of a run of 5; give each step once"),
        ((1, 1), ValueError, "1 and 1 are both step 1; give each step once"),
        ((1, 7), ValueError, "step 7 is beyond the run: it called the model 5 times"),
        ((0.4, 5), ValueError, "step 5 is beyond the run: it has 5 steps"),
        ((0.4, 1.5), ValueError, "must lie in"),
        ((), ValueError, "no step is given"),
        ((0.4, "all"), TypeError, "got 'all'"),
        ("0.4,0.8", TypeError, "got '0.4,0.8'"),
    ],
)
def test_steps_that_are_none(step, error, said):
    model = tiny_model()
    with pytest.raises(error, match=re.escape(said)):
        calibrate(model, tiny_run(model), step, moments=True)
    assert hook_count(model) == 0


def guided_run(model, steps=4, guided=(0, 1), by_name=False):
    """A run whose ``guided`` steps call the model once more, at the same time."""

    def run():
        with torch.no_grad():
            for step in range(steps):
                x, time = tiny_inputs(step)
                for sign in (1, -1)[: 1 + (step in guided)]:
                    model(sign * x, time=time.clone()) if by_name else model(sign * x, time)

    return run


@pytest.mark.parametrize("by_name", [False, True])
def test_calls_at_the_same_time_are_one_step(by_name):
    model = tiny_model()
    found = {step: calibrate(model, guided_run(model, by_name=by_name), step, moments=True) for step in range(4)}
    assert [result.calls_per_step for result in found.values()] == [2, 2, 2, 2]  # the most of a step so far
    assert [result.tokens["blocks.0.to_q"] for result in found.values()] == [20, 20, 10, 10]
    by_hand = calibrate(model, guided_run(model, guided=range(4)), 1, moments=True, calls_per_step=2)
    assert found[1].amax == by_hand.amax
    assert torch.equal(found[1].moments["blocks.0.up"], by_hand.moments["blocks.0.up"])
    assert calibrate(model, guided_run(model), 0.5).steps == calibrate(model, guided_run(model), "all").steps == 4
    assert calibrate(model, guided_run(model), 0.5).amax == found[2].amax
    assert calibrate(model, guided_run(model), -3).amax == found[1].amax
    each = calibrate(model, guided_run(model), 1, calls_per_step=1)
    assert each.tokens["blocks.0.to_q"] == 10


def test_a_counted_run_ends_with_the_step():
    model = tiny_model()
    ended = []

    def run():
        guided_run(model, guided=range(4))()
        ended.append(model.forwards)

    calibrate(model, run, 1.0)
    assert ended == [1] and model.forwards == 1 + 8  # counted to the end, and then cut off: no picture is decoded


def test_a_run_that_swallows_exceptions_still_ends():
    model = tiny_model()

    def run():
        for step in range(9):
            try:
                model(*tiny_inputs(step))
            except Exception:
                pytest.fail("the stop reached the pipeline's own handler")

    assert calibrate(model, run, 2).step == 2
    assert model.forwards == 3
