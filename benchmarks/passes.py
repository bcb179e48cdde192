"""How many passes a block makes over its activations: operations that compute or copy in eager, and what PyTorch's
compiler calls for them (its own kernels, library calls, and ops), in 16 bits, quantized, and quantized and fused.

    python benchmarks/passes.py

Counted on the CPU at the widths of published models, with few tokens: no time comes of it. On a GPU the compiler
schedules by rules of its own; what it fuses (norms, gates, activations) is the same there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_kernels as ditq

SCHEME = "w8a8"
_CALLED = r"^\s+(?:buf\d+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\("
Block = tuple[nn.Module, dict[str, Any]]


class Dispatched(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def _dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=32,
        patch_size=2,
    )


def _dit_block(model: nn.Module) -> Block:
    x = torch.randn(2, 64, 1152, dtype=torch.bfloat16)
    return model.transformer_blocks[0], dict(
        hidden_states=x, timestep=torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def _flux_block(blocks: str) -> Callable[[nn.Module], Block]:
    def block(model: nn.Module) -> Block:
        x, text = (torch.randn(1, tokens, 3072, dtype=torch.bfloat16) for tokens in (64, 32))
        angles = torch.randn(96, 128)
        return getattr(model, blocks)[0], dict(
            hidden_states=x,
            encoder_hidden_states=text,
            temb=torch.randn(1, 3072, dtype=torch.bfloat16),
            image_rotary_emb=(angles.cos(), angles.sin()),
        )

    return block


MODELS: tuple[tuple[str, Callable[[], nn.Module], Callable[[nn.Module], Block]], ...] = (
    ("DiT-XL/2", _dit, _dit_block),
    ("FLUX.1 double", _flux, _flux_block("transformer_blocks")),
    ("FLUX.1 single", _flux, _flux_block("single_transformer_blocks")),
)


def eager(block: nn.Module, inputs: dict[str, Any]) -> int:
    """Operations of one call, after one that fills caches."""
    block(**inputs)
    with Dispatched() as dispatched:
        block(**inputs)
    return dispatched.count


def compiled(block: nn.Module, inputs: dict[str, Any]) -> int:
    """What the compiled block calls."""
    torch.compiler.reset()
    _, (code, *_) = run_and_get_code(torch.compile(block, fullgraph=True), **inputs)
    return len(re.findall(_CALLED, code[code.index("def call") :], re.MULTILINE))


@torch.no_grad()
def main() -> None:
    print(f"| block | | 16 bits | {SCHEME} | {SCHEME}, fused |\n|---|---|---|---|---|")
    for name, build, block_of in MODELS:
        counts = []
        for quantizes, fuses in ((False, False), (True, False), (True, True)):
            torch.manual_seed(0)
            model = nn.Module.to(build().eval(), torch.bfloat16)
            if quantizes:
                ditq.quantize(model, SCHEME, fused=fuses, progress=False)
            counts.append([count(*block_of(model)) for count in (eager, compiled)])
        for how, row in zip(("eager", "compiled"), zip(*counts, strict=True), strict=True):
            print(f"| {name} | {how} | {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
