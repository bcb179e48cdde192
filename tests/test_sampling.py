import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from ditq_kernels.integrations.sampling import default_scheduler, initial_noise, sample, save_grid


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
        ([1, 2], [0], 3, "2 labels but 1 seeds"),
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
