"""What fused blocks are made of: passes that hand on int8 codes where the layers behind them take some.

Each takes activations [B, T, K], and what modulates them as [B, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layer import ops
from ...layer.linear import QuantLinear
from ...layer.quantized_input import QuantizedInput
from ...layer.shared_input import has_hooks, is_bare
from ..shared_projections import ADDED, Added, adds, adds_at

WIDEST_NORM = 16384  # channels that the kernels normalise at once


def takes_codes(layer: nn.Module | None) -> bool:
    """Whether ``layer`` can be given a :class:`QuantizedInput`."""
    return layer is not None and is_bare(layer) and layer.scheme.activation.bits == 8


def normed(
    norm: nn.LayerNorm,
    x: torch.Tensor,
    layer: QuantLinear | None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | QuantizedInput:
    """``norm(x) * (1 + scale) + shift`` as ``layer``, the first of those behind, takes it; None: as a tensor."""
    parts = dict(weight=norm.weight, bias=norm.bias, eps=norm.eps)
    shift, scale = (part if part is None else part.expand(len(x), -1) for part in (shift, scale))
    if takes_codes(layer):
        codes = ops.norm_modulate_quantize(x, shift, scale, layer.input_amax, **parts)
        return QuantizedInput(*codes, x.shape, x.dtype)
    return ops.norm_modulate(x, shift, scale, **parts)


def has_norm(norm: nn.Module | None) -> bool:
    """Whether :func:`normed` computes ``norm``."""
    return (
        isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and norm.normalized_shape[0] <= WIDEST_NORM
    )


def feed_forward(
    block: nn.Module, x: torch.Tensor | QuantizedInput, residual: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """``residual + gate * y``, of diffusers' ``FeedForward`` with GELU, which is quantized as it is computed."""
    gelu = block.net[0]
    return after_gelu(block.net[2], gelu, gelu.proj(x), residual, gate)


def after_gelu(
    layer: nn.Module,
    gelu: nn.Module,
    x: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + gate * y``, of ``layer`` of GELU of ``x`` in the form that ``gelu.approximate`` names, with the
    channels of ``before`` in front of it.
    """
    if takes_codes(layer) and (before is None or before.dtype == x.dtype):
        codes = ops.gelu_quantize(x, layer.input_amax, gelu.approximate, before)
        entering = QuantizedInput(*codes, torch.Size((*x.shape[:-1], codes[0].shape[1])), x.dtype)
        if adds(layer, residual, gate, x.dtype):
            return layer.added_to(residual, gate, entering)
    else:
        entering = F.gelu(x, approximate=gelu.approximate)
        entering = entering if before is None else torch.cat([before, entering], -1)
    return added(residual, gate, layer(entering))


FEED_FORWARD = ("", ".net.0", ".net.1", ".net.3")  # whose own forwards feed_forward does not call


def has_feed_forward(block: nn.Module | None) -> bool:
    """Whether :func:`feed_forward` computes ``block``."""
    net = list(getattr(block, "net", ()))
    if len(net) < 3 or type(net[0]).__name__ != "GELU":
        return False
    return isinstance(net[2], nn.Linear) and all(isinstance(one, nn.Dropout) for one in (net[1], *net[3:]))


def modulation(norm: nn.Module, emb: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """What an adaptive norm makes of ``emb`` [B, K]: ``parts`` of [B, K]."""
    layer = norm.linear
    loads_silu = is_bare(layer) and layer.scheme.activation.bits != 8 and not has_hooks(norm.silu)
    return (layer.of_silu(emb) if loads_silu else layer(norm.silu(emb))).chunk(parts, dim=1)


def fits(part: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether what modulates ``x`` has a row for each of its samples, or one for all."""
    return len(part) in (1, len(x))


def attended(attention: nn.Module, outputs: Added, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """``residual + gate * y`` of each of ``attention``'s outputs ``y``.

    Args:
        outputs: (residual, gate) by the name of the layer that an output comes from, in the outputs' order.
        inputs: of the attention.
    """
    known = {name: pair for name, pair in outputs.items() if adds_at(attention, name, *pair)}
    found = attention(**inputs, **({ADDED: known} if known else {}))
    results = (found,) if isinstance(found, torch.Tensor) else found
    return tuple(
        y if name in known else added(*pair, y) for (name, pair), y in zip(outputs.items(), results, strict=False)
    )


def projected(
    attention: nn.Module, name: str, y: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """``residual + gate * z``, of ``z`` that the layer ``name`` of ``attention`` makes of ``y``."""
    layer = getattr(attention, name)
    if adds_at(attention, name, residual, gate):
        return (layer[0] if name == "to_out" else layer).added_to(residual, gate, y)
    z = layer[1](layer[0](y)) if name == "to_out" else layer(y)
    return added(residual, gate, z)


def added(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + gate * y`` in ``x.dtype``, rounded once."""
    return torch.addcmul(x, gate.unsqueeze(1), y).to(x.dtype)


def clipped(x: torch.Tensor) -> torch.Tensor:
    """``x``, whose largest values fp16 holds."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def quantize_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether the codes that one of ``layers`` would make of an input are those of the others."""
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return False
    first, *others = layers
    return all(
        layer.scheme.activation == first.scheme.activation
        and (first.input_amax is None or torch.equal(layer.input_amax, first.input_amax))
        for layer in others
    )
