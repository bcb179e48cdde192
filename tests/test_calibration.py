"""What a calibration holds and stores; that it leaves no trace on the model, and says clearly what is wrong."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import TinyModel, hook_count, inputs_at, tiny_inputs, tiny_model, tiny_run
from torch import nn

from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.memory import MemoryWarning
from ditq_kernels.model.calibration import VERSION, Calibration, calibrate, moment_bytes
from ditq_kernels.model.observation import largest_magnitude, linear_layers, second_moment


def test_moments_are_shared_between_layers_with_the_same_input():
    model = tiny_model()
    result = calibrate(model, tiny_run(model), 0, moments=True)
    expected = {name: second_moment(x) for name, x in inputs_at(model, 0).items()}
    assert result.moments.keys() == expected.keys()
    assert all(torch.equal(result.moments[name], expected[name]) for name in expected)
    q, k, v = (result.moments[f"blocks.1.{name}"] for name in ("to_q", "to_k", "to_v"))
    assert q is k is v
    assert q is not result.moments["blocks.1.up"]


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.one(x)
        return y + self.two(input=x.mul_(2))


def test_an_input_changed_in_place_is_no_shared_input():
    model = ChangesItsInput()

    def run():
        with torch.inference_mode():
            model(torch.ones(3, 8))

    result = calibrate(model, run, 0, moments=True)
    assert torch.equal(result.moments["one"], torch.full((8, 8), 3.0))
    assert torch.equal(result.moments["two"], torch.full((8, 8), 12.0))  # its input came as a keyword
    assert result.amax == {"one": 1.0, "two": 2.0}


def test_moments_under_inference_mode_and_autocast_are_ordinary_fp32():
    model = tiny_model()

    def run():
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(*tiny_inputs())

    moment = calibrate(model, run, 0, moments=["embedder"]).moments["embedder"]
    assert not moment.is_inference() and moment.dtype == torch.float32
    assert torch.equal(moment, second_moment(tiny_inputs()[0]))  # not multiplied in bf16


def test_second_moment_in_chunks_is_that_of_all_rows(monkeypatch):
    x = torch.randint(-8, 9, (100, 16)).to(torch.bfloat16)  # integers: every order of summation is exact
    monkeypatch.setattr("ditq_kernels.model.observation.ROWS_PER_CHUNK", 7)
    assert torch.equal(second_moment(x), (x.double().T @ x.double()).float())


def test_percentile_is_the_nearest_rank():
    x = torch.arange(-1000, 1000).flip(0).view(2, 10, 100).float()
    magnitudes = x.abs().flatten().sort().values
    assert largest_magnitude(x, 99.0) == magnitudes[1979]
    assert largest_magnitude(x, 100) == 1000
    assert largest_magnitude(x, 1e-9) == 0


def test_percentile_of_more_elements_than_torch_quantile_takes():
    x = torch.zeros(2**24 + 10, dtype=torch.bfloat16)
    x[:5] = 3
    assert (largest_magnitude(x, 99.0), largest_magnitude(x, 100)) == (0, 3)


def test_percentile_replaces_amax():
    model = tiny_model()
    result = calibrate(model, tiny_run(model), 2, percentile=90)
    assert result.percentile == 90
    assert result.amax == {name: largest_magnitude(x, 90) for name, x in inputs_at(model, 2).items()}
    assert all(result.amax[name] < float(x.abs().max()) for name, x in inputs_at(model, 2).items())


def test_moment_bytes_bounds_what_is_taken():
    model = tiny_model()
    taken = calibrate(model, tiny_run(model), 0, moments=True).moments.values()
    assert moment_bytes(model) == sum(4 * layer.in_features**2 for layer in linear_layers(model).values())
    assert sum(moment.nbytes for moment in {id(m): m for m in taken}.values()) < moment_bytes(model)
    assert moment_bytes(model, ["blocks.*.down"]) == 2 * 4 * 64**2


def test_layers_that_are_not_called_or_quantized_are_absent():
    model = tiny_model()
    model.unused = nn.Linear(32, 4)
    model.head = QuantLinear.from_linear(model.head, "w8a8")
    result = calibrate(model, tiny_run(model), 0)
    assert "unused" in result.in_features and "unused" not in result.amax
    assert "head" not in result.in_features


@pytest.mark.parametrize("step", [0, 0.5])
def test_no_trace_is_left_on_the_model(step):
    model = tiny_model()
    calibrate(model, tiny_run(model), step, moments=True)
    assert hook_count(model) == 0 and "forward" not in vars(model)

    def broken():
        model(*tiny_inputs())
        raise RuntimeError("the sampler failed")

    with pytest.raises(RuntimeError, match="the sampler failed"):
        calibrate(model, broken, 0.5)
    with pytest.raises(RuntimeError, match="the sampler failed"):
        calibrate(model, broken, 1)
    assert hook_count(model) == 0 and "forward" not in vars(model)


def test_a_forward_set_on_the_instance_is_put_back():
    model = tiny_model()
    calls = []

    def offloading(*args):
        calls.append(args)
        return TinyModel.forward(model, *args)

    model.forward = offloading
    calibrate(model, tiny_run(model), -1)
    assert model.forward is offloading and len(calls) == 1 + 5


def fails(match, model=None, run=None, kind=ValueError, **arguments):
    model = model or tiny_model()
    with pytest.raises(kind, match=match):
        calibrate(model, run or tiny_run(model), **arguments)
    assert hook_count(model) == 0


def test_errors_name_what_is_at_fault():
    fails("no unquantized linear layer", nn.Sequential(nn.ReLU()))
    fails("never called the TinyModel", run=lambda: None, step=0)
    fails("never called the TinyModel", run=lambda: None, step=0.5)
    fails("step 5 is beyond the run: it called the model 5 times", step=5)
    fails("step -6 is beyond the run: it has 5 steps", step=-6)
    fails("5 times, which is no multiple of calls_per_step = 2", step=0.5, calls_per_step=2)
    fails(r"must lie in \[0, 1\], got 1.5", step=1.5)
    fails(r"must lie in \[0, 1\], got nan", step=float("nan"))
    fails("step must be an int", step="0.5", kind=TypeError)
    fails("step must be an int", step=True, kind=TypeError)
    fails("percentile must lie in", percentile=0)
    fails("percentile must lie in", percentile=100.5)
    fails("calls_per_step must be a positive int", calls_per_step=0)
    fails("'blocks.7.*' matches no", moments=["blocks.0.*", "blocks.7.*"])
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        calibrate("pipeline", print)
    with pytest.raises(TypeError, match="run must be callable"):
        calibrate(tiny_model(), 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("swallows", [False, True])
def test_activations_that_are_not_finite_name_the_first_layer(bad, swallows):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].to_v.bias[3] = bad

    def run():
        try:
            model(*tiny_inputs())
        except Exception:
            assert swallows

    fails(r"the input of blocks\.1\.up holds NaN or infinite", model, run, step=0)


def test_check_refuses_another_model():
    model = tiny_model()
    result = calibrate(model, tiny_run(model), 0)
    result.check(model)
    model.head = QuantLinear.from_linear(model.head, "w8a8")
    result.check(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.modulation has K = 64 in this TinyModel and K = 32 there"):
        result.check(tiny_model(width=64))
    del model.blocks[1]
    with pytest.raises(ValueError, match=r"\(TinyModel\): this TinyModel has no linear layer blocks\.1\.modulation"):
        result.check(model)


@pytest.mark.parametrize("step", [0.5, (0.5, 0.9), "all"])
def test_save_and_load_give_the_same_calibration(tmp_path, step):
    model = tiny_model()
    result = calibrate(model, tiny_run(model), step, percentile=99.5, moments=True)
    result.save(tmp_path / "cal.safetensors")
    result.save(tmp_path / "cal.safetensors")  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["cal.safetensors"]
    loaded = Calibration.load(tmp_path / "cal.safetensors")
    before, after = dict(vars(result)), dict(vars(loaded))
    moments, loaded_moments = before.pop("moments"), after.pop("moments")
    channels, loaded_channels = before.pop("channel_amax"), after.pop("channel_amax")
    assert before == after
    assert channels.keys() == loaded_channels.keys() and channels
    assert all(torch.equal(channels[name], loaded_channels[name]) for name in channels)
    assert list(moments) == list(loaded_moments)
    assert all(torch.equal(moments[name], loaded_moments[name]) for name in moments)
    assert loaded_moments["blocks.0.to_q"] is loaded_moments["blocks.0.to_k"]


def test_a_calibration_of_the_first_version_is_of_one_step(tmp_path):
    model = tiny_model()
    calibrate(model, tiny_run(model), 2, moments=True).save(tmp_path / "now")
    with safe_open(tmp_path / "now", framework="pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    record = json.loads(header["calibration"])
    del record["moment_steps"]
    save_file(tensors, tmp_path / "before", metadata=header | dict(version="1", calibration=json.dumps(record)))
    loaded = Calibration.load(tmp_path / "before")
    assert (loaded.step, loaded.moment_steps, loaded.observed) == (2, (), 2)


def test_moments_that_may_not_fit_are_said_before_the_run(monkeypatch):
    model = tiny_model()
    wanted = moment_bytes(model)
    monkeypatch.setattr("ditq_kernels.memory.available_bytes", lambda: wanted - 1)

    def run():
        raise AssertionError("it ran before it was said")

    with pytest.warns(MemoryWarning, match=f"up to {wanted / 1e9:.1f} GB, and") as said, pytest.raises(AssertionError):
        calibrate(model, run, 0, moments=True)
    assert said[0].filename == __file__
    for available in (wanted, None):
        monkeypatch.setattr("ditq_kernels.memory.available_bytes", lambda value=available: value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calibrate(model, tiny_run(model), 0, moments=True)


def test_shared_moments_are_stored_once(tmp_path):
    model = tiny_model(width=64)

    def run():
        model(*tiny_inputs(width=64))

    calibrate(model, run, 0, moments=["*.to_q"]).save(tmp_path / "one")
    calibrate(model, run, 0, moments=["*.to_[qkv]"]).save(tmp_path / "three")
    assert (tmp_path / "three").stat().st_size - (tmp_path / "one").stat().st_size < 4 * 64**2


def test_load_refuses_what_is_no_calibration(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        Calibration.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="is not a calibration file"):
        Calibration.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="but not a calibration"):
        Calibration.load(path)
    save_file({}, path, metadata={"format": "ditq-calibration", "version": str(VERSION + 1)})
    with pytest.raises(ValueError, match="newer ditq_kernels; upgrade"):
        Calibration.load(path)
    damaged = {"format": "ditq-calibration", "version": "1", "moments": "{}", "calibration": json.dumps({"step": 1})}
    save_file({}, path, metadata=damaged)
    with pytest.raises(ValueError, match="damaged"):
        Calibration.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = tiny_model()
    result = calibrate(model, tiny_run(model), 0)
    result.save(tmp_path / "cal")
    before = (tmp_path / "cal").read_bytes()

    def full_disk(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        result.save(tmp_path / "cal")
    assert [path.name for path in tmp_path.iterdir()] == ["cal"]
    assert (tmp_path / "cal").read_bytes() == before


def test_a_compiled_model_is_observed_too():
    model = tiny_model()
    expected = calibrate(model, tiny_run(model), 0.5).amax
    model.compile(backend="eager")
    model(*tiny_inputs())  # compiled before the hooks are there
    assert calibrate(model, tiny_run(model), 0.5).amax == expected


def test_all_steps_are_one_long_step(tmp_path):
    model = tiny_model()
    every = calibrate(model, tiny_run(model, steps=4), "all", moments=True)
    assert (every.step, every.steps) == (None, 4)
    singles = [calibrate(model, tiny_run(model, steps=4), step, moments=True) for step in range(4)]
    for name, amax in every.amax.items():
        assert amax == max(single.amax[name] for single in singles)
        assert every.tokens[name] == sum(single.tokens[name] for single in singles)
        torch.testing.assert_close(every.moments[name], sum(single.moments[name] for single in singles))
        channels = torch.stack([single.channel_amax[name] for single in singles]).amax(0)
        assert torch.equal(every.channel_amax[name], channels)
    every.save(tmp_path / "all.safetensors")
    assert Calibration.load(tmp_path / "all.safetensors").step is None
    with pytest.raises(ValueError, match="never called"):
        calibrate(model, lambda: None, "all")
    with pytest.raises(ValueError, match="no multiple of calls_per_step = 3"):
        calibrate(model, tiny_run(model, steps=4), "all", calls_per_step=3)
    with pytest.raises(TypeError, match="or \"all\", got 'most'"):
        calibrate(model, tiny_run(model), "most")


def test_calibrations_of_several_runs_are_merged(tmp_path):
    """As one calibration of a run that draws all of it at once, but for the order of sums."""
    model = tiny_model()
    inputs = [tiny_inputs(step) for step in range(3)]

    def run(*chosen):
        with torch.no_grad():
            model(*(torch.cat(parts) for parts in zip(*(inputs[i] for i in chosen), strict=True)))

    together = calibrate(model, lambda: run(0, 1, 2), 0, moments=True)
    merged = Calibration.merged([calibrate(model, lambda i=i: run(i), 0, moments=True) for i in range(3)])
    assert merged.amax == pytest.approx(together.amax) and merged.tokens == together.tokens
    assert merged.rows == together.rows and merged.step == 0
    for name, moment in together.moments.items():
        torch.testing.assert_close(merged.moments[name], moment)
        assert torch.allclose(merged.channel_amax[name], together.channel_amax[name])
    assert merged.moments["blocks.0.to_q"] is merged.moments["blocks.0.to_k"]
    alone = calibrate(model, lambda: run(0), 0, moments=True)
    assert Calibration.merged([alone]).amax == alone.amax
    with pytest.raises(ValueError, match="moments of different layers"):
        Calibration.merged([alone, calibrate(model, lambda: run(0), 0)])
    with pytest.raises(ValueError, match="are not of one model"):
        Calibration.merged([alone, Calibration("Other", {}, 0, 1, 1)])
