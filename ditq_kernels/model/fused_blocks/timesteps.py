"""Sinusoids of timesteps, whose frequencies stay the same: diffusers' ``Timesteps``, in five passes for eleven. DiT has
one in every block.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .block import FusedBlock

_LONGEST_PERIOD = 10000
_FREQUENCIES = "_ditq_frequencies"  # where a module keeps them, by device


def _is_known(module: nn.Module) -> bool:
    return module.num_channels % 2 == 0 and module.scale == 1


def _frequencies(module: nn.Module, device: torch.device) -> torch.Tensor:
    """fp32 [channels / 2], computed as diffusers does."""
    known = vars(module).setdefault(_FREQUENCIES, {})
    if device in known:
        return known[device]
    half = module.num_channels // 2
    exponents = -math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device=device)
    found = torch.exp(exponents / (half - module.downscale_freq_shift))
    if type(found) is torch.Tensor:  # and not one of a mode that only looks at shapes
        known[device] = found
    return found


def _forward(module: nn.Module, timesteps: torch.Tensor) -> torch.Tensor | None:
    # A compiler makes one kernel of it, and a graph's memory must not outlive it.
    if timesteps.ndim != 1 or torch.compiler.is_compiling() or _is_captured(timesteps):
        return None
    angles = timesteps[:, None].float() * _frequencies(module, timesteps.device)
    parts = torch.cos(angles), torch.sin(angles)
    return torch.cat(parts if module.flip_sin_to_cos else parts[::-1], dim=-1)


def _is_captured(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


TIMESTEPS = FusedBlock("Timesteps", ("timesteps",), _is_known, (), _forward)
