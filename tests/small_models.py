"""Models and sampling runs small enough for a CPU, shared by the tests of calibration, conversion and checkpoints."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ditq_kernels.model.conversion import quantized_layers
from ditq_kernels.model.observation import linear_layers


class Block(nn.Module):
    """Attention-like products on one input, a modulation by the time, and an MLP."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x, time):
        x = x * (1 + self.modulation(time).unsqueeze(1))
        x = x + torch.sigmoid(self.to_q(x)) * self.to_k(x) + self.to_v(x)
        return x + self.down(torch.relu(self.up(x)))


class TinyModel(nn.Module):
    """An embedder, two blocks, a head and a buffer that no state dict holds; counts its forward passes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedder = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 4)
        self.register_buffer("position", torch.arange(width, dtype=torch.float32), persistent=False)
        self.forwards = 0

    def forward(self, x, time):
        self.forwards += 1
        x = self.embedder(x) + self.position / 100
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


def tiny_model(seed: int = 0, width: int = 32) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(width).eval()


def tiny_inputs(step: int = 0, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, time) of one call of a :class:`TinyModel`; different at every step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, 5, 4, generator=generator), torch.randn(2, width, generator=generator)


def tiny_run(model: nn.Module, steps: int = 5):
    """A sampling run whose inputs do not depend on the model's outputs, so that each step's are known."""

    def run():
        with torch.no_grad():
            for step in range(steps):
                model(*tiny_inputs(step))

    return run


def tiny_dit(seed: int = 0):
    """A diffusers DiT of two blocks, every parameter random (its zero initialisation would hide errors)."""
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=11,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def dit_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 500]), torch.tensor([1, 10])


def assert_same_bits(one: nn.Module, other: nn.Module, output: Callable[[nn.Module], torch.Tensor]) -> None:
    """Of all that two quantized models hold, of how their layers are stored, and of what they put out."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    stored = [[(n, x.scheme, x.dtype) for n, x in quantized_layers(model).items()] for model in (one, other)]
    assert stored[0] == stored[1] != []
    assert torch.equal(output(one), output(other))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, to tell whether a failed call changed something."""
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = snapshot(model)
    return now.keys() == before.keys() and all(_same(now[name], before[name]) for name in before)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every element; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def inputs_at(model, step):
    """What each linear layer is fed in one step, by hooks of the test's own."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone()))
        for name, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        model(*tiny_inputs(step))
    for hook in hooks:
        hook.remove()
    return seen


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
