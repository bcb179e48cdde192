"""Products in bf16 on CPUs without instructions for them, where PyTorch's own take ten times as long as in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..model.conversion import replace_module


def is_emulated(device: torch.device | str) -> bool:
    """Whether PyTorch multiplies bf16 on ``device`` without instructions for it."""
    return torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class RoundedLinear(nn.Linear):
    """A linear layer in bf16 that multiplies in fp32 and rounds once, as matrix units do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def rounding(model: nn.Module) -> nn.Module:
    """``model``, in bf16, in place, its linear layers as :class:`RoundedLinear`."""
    for layer in [module for module in model.modules() if type(module) is nn.Linear]:
        rounded = RoundedLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        rounded.weight, rounded.bias = layer.weight, layer.bias
        replace_module(model, layer, rounded)
    return model
