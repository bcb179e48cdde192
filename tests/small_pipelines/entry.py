"""What an entry of the table of small pipelines is, and the one rule by which their weights are drawn."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
# Where the MLP is as wide as 8/3 of the rest, so that its layers, too, come in whole groups of 32.
THIRDS = {"num_attention_heads": 3, "attention_head_dim": 32}
LAST_TEXT = "what the last block makes of the text's tokens is thrown away"
PROMPT, NEGATIVE = "a red fox", "dull"


@dataclass(frozen=True, eq=False)  # an entry is itself alone, and a key where one is needed
class SmallPipeline:
    """A whole pipeline of diffusers, with random weights, that draws within a second on one core.

    Attributes:
        name: of the architecture, as tests are called by it.
        build: the pipeline of a seed of weights.
        call: arguments of the pipeline's call, besides those that say how many steps and in which form.
        video: whether it draws a video: (samples, frames, channels, height, width) in place of an image.
        adapters: whether the pipeline has ``load_lora_weights``.
        only_pixels: whether its call cannot stop before the VAE.
        fewest_steps: that its call takes.
        unseen: names of linear layers in the transformer's blocks that cannot change what is drawn, and why not.
    """

    name: str
    build: Callable[[int], DiffusionPipeline]
    call: Mapping[str, Any]
    video: bool = False
    adapters: bool = True
    only_pixels: bool = False
    fewest_steps: int = 1
    unseen: Mapping[str, str] = field(default_factory=dict)

    def draw(self, pipe: DiffusionPipeline, steps: int = 2, latent: bool = False) -> torch.Tensor:
        """What ``pipe`` draws from noise that is always the same: pixels in 0...1, or latents in the pipeline's shape.

        Latents are what comes of the transformer without the VAE's work, where the pipeline can stop there.
        """
        pipe.set_progress_bar_config(disable=True)
        form = "latent" if latent and not self.only_pixels else "pt"
        # diffusers draws all noise on the generator's device, so that it is the same wherever the pipeline is.
        generator = torch.Generator().manual_seed(7)
        steps = max(steps, self.fewest_steps)
        drawn = pipe(num_inference_steps=steps, output_type=form, generator=generator, **self.call)
        return drawn.frames if self.video else drawn.images


def randomised(module: Module, seed: int) -> Module:
    """``module`` with every parameter drawn anew, on a scale that keeps what passes through at about its own size.

    Trained models start from gates, final layers and biases of zero, and hide behind them what a layer computes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                mean, deviation = _scale(owner, name, parameter)
                parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def in_own_memory(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """``pipe`` with every weight in memory that PyTorch allocated.

    A loaded weight is a part of the file, and starts at whatever byte the file's header ends: products of weights that
    start otherwise are added up in another order on some CPUs, which shows in their last bits.
    """
    for component in pipe.components.values():
        for tensor in [*component.parameters(), *component.buffers()] if isinstance(component, nn.Module) else []:
            tensor.data = tensor.data.clone()
    return pipe


def _scale(owner: nn.Module, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of one parameter of ``owner``."""
    if name == "bias":
        return 0.0, 0.1
    if "norm" in type(owner).__name__.lower():
        return 1.0, 0.1
    if name == "weight" and parameter.dim() > 1 and not isinstance(owner, nn.Embedding):
        return 0.0, 1 / math.sqrt(parameter[0].numel())  # linear layers and convolutions
    return 0.0, 0.5  # embeddings, tables of modulation, tokens that pad
