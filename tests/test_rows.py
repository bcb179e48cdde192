"""Modulations and embedders are found by what they are fed, and no large layer stays in 16 bits as a small one."""

import pytest
import torch
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.model.observation import rows_per_sample
from ditq_kernels.model.recipes.general import FEW_WEIGHTS
from ditq_kernels.model.rows import samples_of

WIDTH = 32


class Block(nn.Module):
    """Its modulation is called as in no list of names, and one of its products as modulations are."""

    def __init__(self) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.norm_mlp = nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH)})
        self.seldom = nn.ModuleDict({"norm": nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH)})})

    def forward(self, x, time):
        return x + self.norm_mlp["linear"](x * self.img_mod(time).unsqueeze(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


def inputs(samples=2):
    return torch.randn(samples, 5, WIDTH), torch.randn(samples, WIDTH)


def call(model, samples=2):
    return lambda: model(*inputs(samples))


def schemes_of(plan):
    return {entry.name.removeprefix("blocks.0."): entry.scheme for entry in plan if entry.name.startswith("blocks.0.")}


SEEN = {"img_mod.1": "w8a16", "norm_mlp.linear": "w8a8", "seldom.norm.linear": "w8a16"}
BY_NAME = {"img_mod.1": "w8a8", "norm_mlp.linear": "w8a16", "seldom.norm.linear": "w8a16"}


def test_rows_of_a_calibrated_step_decide_and_not_names(tmp_path):
    torch.manual_seed(0)
    model = Model()
    calibration = ditq.calibrate(model, call(model), 0)
    assert calibration.rows["blocks.0.img_mod.1"] == 1 and calibration.rows["blocks.0.norm_mlp.linear"] == 5
    assert schemes_of(ditq.plan(model, "w8a8")) == BY_NAME
    chosen = ditq.plan(model, "w8a8", calibration=calibration)
    assert schemes_of(chosen) == SEEN  # of layers that the step did not call, names still do
    assert "as was seen" in chosen["blocks.1.img_mod.1"].reason
    calibration.save(tmp_path / "step.safetensors")
    again = ditq.Calibration.load(tmp_path / "step.safetensors")
    assert ditq.plan(model, "w8a8", calibration=again) == chosen
    quantized = ditq.quantize(model, "w8a8", calibration, progress=False)
    assert quantized.blocks[1].img_mod[1].scheme.name == "w8a16"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("samples", [1, 3])
def test_one_forward_pass_of_shapes_is_enough(device, samples):
    with torch.device(device):
        model = Model()

        def run():
            with torch.device(device):
                call(model, samples)()
            raise AssertionError("a second call")

        rows = rows_per_sample(model, run)
    assert rows == {
        f"blocks.{i}.{name}": count for i in range(2) for name, count in (("img_mod.1", 1), ("norm_mlp.linear", 5))
    }
    assert schemes_of(ditq.plan(model, "w8a8", rows=rows)) == SEEN
    with pytest.raises(ValueError, match=r"run\(\) never called the Model"):
        rows_per_sample(model, lambda: None)


def test_a_layer_called_twice_is_fed_both():
    class Twice(Model):
        def forward(self, hidden_states, timestep):
            for _ in range(2):
                hidden_states = super().forward(hidden_states, timestep)
            return hidden_states

    model = Twice()
    assert rows_per_sample(model, call(model))["blocks.0.img_mod.1"] == 2


def test_how_many_samples_a_call_has():
    x = torch.zeros(3, 4, 5)
    assert samples_of((x,), {}) == samples_of((), {"t": torch.zeros(7), "x": x}) == 3
    assert samples_of(([torch.zeros(4, 5)] * 2, torch.zeros(2)), {}) == 2
    assert samples_of((torch.zeros(3, 4), 1), {"x": [1]}) is None


def test_where_samples_cannot_be_counted_names_decide():
    model = Model()
    calibration = ditq.calibrate(model, lambda: model(torch.randn(5, WIDTH), torch.randn(1, WIDTH)), 0)
    assert calibration.rows == {}
    assert schemes_of(ditq.plan(model, "w8a8", calibration=calibration)) == BY_NAME


def test_a_large_layer_is_not_kept_as_one_of_few_weights():
    side = int(FEW_WEIGHTS**0.5)
    with torch.device("meta"):
        model = Model()
        model.head = nn.Linear(side, side)
        model.large_head = nn.Linear(side, side + 1)
        model.blocks[0].time_embedder = nn.ModuleDict({"a": nn.Linear(side, side), "b": nn.Linear(side + 1, side)})
    chosen = ditq.plan(model, "w4a8_g128")
    schemes = {name: chosen[name].scheme for name in ("head", "large_head")}
    assert schemes == {"head": None, "large_head": "w4a16_g128"}
    schemes = {name: chosen[f"blocks.0.time_embedder.{name}"].scheme for name in "ab"}
    assert schemes == {"a": None, "b": "w4a16_g128"}
    assert "many weights" in chosen["large_head"].reason and "many weights" in chosen["blocks.0.time_embedder.b"].reason
