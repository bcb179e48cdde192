"""Class-conditional sampling: against diffusers' own pipeline, and what a picture may depend on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from small_sources import small_pipeline
from torch import nn

from ditq_kernels.integrations.pictures import to_unit_range
from ditq_kernels.integrations.sampling import default_scheduler, initial_noise, sample, save_grid
from ditq_kernels.integrations.source import Source


def tiny_dit(seed=0, **overrides):
    torch.manual_seed(seed)
    config = dict(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        num_layers=2,
        patch_size=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return DiTTransformer2DModel(**(config | overrides)).eval()


def draw(model, labels, seeds, **arguments):
    return sample(model, default_scheduler(), labels, seeds, **(dict(steps=3, progress=False) | arguments))


def test_a_picture_depends_on_its_class_and_seed_and_not_on_its_batch():
    model = tiny_dit()
    together = draw(model, [1, 2, 1], [5, 6, 7])
    assert together.shape == (3, 1, 8, 8) and together.dtype == torch.float32
    alone = draw(model, [2], [6])
    # The noise is the same to the bit; the network's products may be summed in another order for another batch.
    assert torch.equal(initial_noise(model, [5, 6, 7])[1], initial_noise(model, [6])[0])
    assert torch.allclose(together[1], alone[0], rtol=0, atol=1000 * torch.finfo(torch.float32).eps)
    assert not torch.allclose(together[0], together[2])


def test_repeated_sampling_gives_the_same_bits():
    model, scheduler = tiny_dit(), default_scheduler()
    first, second = (sample(model, scheduler, [3], [1], steps=4, progress=False) for _ in range(2))
    assert torch.equal(first, second)


def test_guidance_uses_the_class_that_stands_for_none():
    model = tiny_dit()
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    draw(model, [4, 9], [0, 0], steps=1)
    draw(model, [4, 9], [0, 0], steps=1, guidance=1)
    assert seen == [[4, 9, 10, 10], [4, 9]]


def test_models_that_learn_their_variance():
    assert draw(tiny_dit(out_channels=2), [0], [0]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("labels", "seeds", "steps", "message"),
    [
        ([10], [0], 3, "class 10 does not exist: this model's classes are 0 to 9"),
        ([-1], [0], 3, "class -1 does not exist"),
        ([1, 2], [0], 3, "2 labels but 1 seeds"),
        ([], [], 3, "at least one label"),
        ([1], [0], 0, "steps must be at least 1"),
    ],
)
def test_bad_input_is_named(labels, seeds, steps, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_dit(), labels, seeds, steps=steps)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_pictures_row_by_row(channels, tmp_path):
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    save_grid(levels.view(6, 1, 1, 1).expand(6, channels, 4, 5), 3, tmp_path / "new" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape[:2] == (8, 15)
    found = [int(np.ravel(grid[4 * row, 5 * column])[0]) for row in range(2) for column in range(3)]
    assert found == [0, 64, 128, 191, 255, 255]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_a_failed_grid_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"earlier")

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(torch.zeros(1, 1, 4, 4), 1, path)
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pictures_are_those_of_diffusers_own_pipeline(guidance):
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    labels, seeds = [3, 999, 3], [5, 6, 7]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipeline(labels, guidance, generators, num_inference_steps=3, output_type="np").images
    samples = draw(pipeline.transformer, labels, seeds, guidance=guidance)
    ours = to_unit_range(Source(Path(), pipeline.transformer, vae=pipeline.vae).decode(samples))
    assert samples.shape == (3, 4, 8, 8)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))


class Elementwise(nn.Module):
    """Stands for a DiT, without sums over elements: its output's bits cannot depend on the batch. Records its calls."""

    CLASSES = 10

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=4, num_embeds_ada_norm=self.CLASSES)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, x, timestep, class_labels):
        self.calls.append((x.clone(), timestep.clone(), class_labels.clone()))
        per_picture = (1 + class_labels).view(-1, 1, 1, 1) / (1 + self.CLASSES)
        return SimpleNamespace(sample=self.gain * x + per_picture * torch.cos(timestep.view(-1, 1, 1, 1) / 100))


def sample_with(scheduler, labels, seeds, steps=4):
    return sample(Elementwise(), scheduler, labels, seeds, steps=steps, progress=False)


@pytest.mark.parametrize("scheduler", [default_scheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_picture_has_the_same_bits_alone_and_in_a_batch(scheduler):
    """DDPM adds noise at each step: that too is the picture's own."""
    together = sample_with(scheduler(), [1, 2, 1], [10, 10, 11])
    torch.manual_seed(1)  # the global generator's state must not matter
    apart = [sample_with(scheduler(), [label], [seed]) for label, seed in ((1, 10), (2, 10), (1, 11))]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together[0], together[1]), "the class changes nothing"
    assert not torch.equal(together[0], together[2]), "the seed changes nothing"


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    sample_with(DDPMScheduler(), [0], [0])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_can_be_used_again(scheduler):
    used = scheduler()
    first = sample_with(used, [1], [2])
    sample_with(used, [5], [6], steps=7)
    assert torch.equal(first, sample_with(used, [1], [2]))


def test_guidance_moves_away_from_the_unconditional_prediction():
    model, scheduler = Elementwise(), default_scheduler()
    result = sample(model, scheduler, [4, 7], [0, 1], steps=1, guidance=3.0, progress=False)
    ((x, timestep, labels),) = model.calls
    assert torch.equal(x[:2], initial_noise(model, [0, 1])) and torch.equal(x[:2], x[2:])
    conditional, unconditional = (model(x[:2], timestep[:2], y).sample for y in (labels[:2], labels[2:]))
    guided = unconditional + 3.0 * (conditional - unconditional)
    assert torch.equal(result, scheduler.step(guided, scheduler.timesteps[0], x[:2]).prev_sample)


def test_a_model_in_bfloat16_is_fed_bfloat16_and_the_steps_stay_fp32():
    model = Elementwise().to(torch.bfloat16)
    result = sample(model, default_scheduler(), [1], [2], steps=4, progress=False)
    assert model.calls[0][0].dtype == torch.bfloat16
    assert result.dtype == torch.float32 and not torch.equal(result, result.to(torch.bfloat16).float())


def test_a_scheduler_scales_its_noise_and_what_the_model_is_given():
    """Euler's samples are as large as its sigmas, and the model is given them as large as noise of size one."""
    model, scheduler = Elementwise(), EulerDiscreteScheduler()
    sample(model, scheduler, [1], [2], steps=4, guidance=1.0, progress=False)
    noise = initial_noise(model, [2])
    sigma = scheduler.sigmas[0]
    assert sigma > 5 and scheduler.init_noise_sigma > 5
    first = noise * scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(model.calls[0][0], first)

    # Where what the model predicts is the noise itself, taking it away leaves nothing.
    class Noise(Elementwise):
        def forward(self, x, timestep, class_labels):
            super().forward(x, timestep, class_labels)
            return SimpleNamespace(sample=noise.expand_as(x))

    found = sample(Noise(), EulerDiscreteScheduler(), [1], [2], steps=4, guidance=1.0, progress=False)
    assert found.abs().max() < 0.1 * noise.abs().max()
