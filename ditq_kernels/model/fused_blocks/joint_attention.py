"""Attention over a picture's tokens, and a text's beside them, in fewer passes: queries and keys are normalised,
rotated and put together in one. What differs from model to model stands in a table; attention itself is asked for as
the model's processor does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layer import ops
from ...layer.linear import QuantLinear
from ...layer.quantized_input import QuantizedInput
from ...layer.shared_input import has_hooks
from ..shared_projections import KnownCode, is_written_in, joined_at
from ..substituted_class import class_before

CODE = "_ditq_joint_code"  # where an attention keeps a KnownCode
CHANNELS = (16, 32, 64, 128, 256)  # of heads that the kernels take

Rotary = tuple[torch.Tensor, torch.Tensor]
Stream = torch.Tensor | QuantizedInput


@dataclass(frozen=True)
class JointAttention:
    """Attributes:
    module: of diffusers, in which the processor is written.
    functions: that it calls and this file does not, by name: somebody may have put others in their place.
    norm: the class of the norms of queries and keys, (module, name).
    text_first: whether the text's tokens stand in front of the picture's.
    attend: attention as the processor asks for it, of queries, keys and values [B, S, H, D], to the same.
    """

    module: str
    functions: tuple[str, ...]
    norm: tuple[str, str]
    text_first: bool
    attend: Callable[..., torch.Tensor]


def _by_dispatch(processor: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from diffusers.models.transformers import transformer_flux

    backend, parallel = processor._attention_backend, processor._parallel_config
    return transformer_flux.dispatch_attention_fn(
        query, key, value, attn_mask=None, backend=backend, parallel_config=parallel
    )


def _by_pytorch(processor: Any, *operands: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in operands)).transpose(1, 2)


# By the name of the processor's class.
JOINT_ATTENTIONS: dict[str, JointAttention] = {
    "FluxAttnProcessor": JointAttention(
        "diffusers.models.transformers.transformer_flux",
        ("_get_qkv_projections", "_get_projections", "apply_rotary_emb"),
        ("torch.nn", "RMSNorm"),
        True,
        _by_dispatch,
    ),
    "JointAttnProcessor2_0": JointAttention(
        "diffusers.models.attention_processor", (), ("diffusers.models.normalization", "RMSNorm"), False, _by_pytorch
    ),
}


def joint_attention(
    attention: nn.Module, x: Stream, text: Stream | None = None, rotary: Rotary | None = None
) -> tuple[torch.Tensor, ...] | None:
    """What attention makes of ``x`` [B, T, K], and of ``text`` beside it, before the layers behind it: (that of ``x``,
    that of ``text``); None where something else may be computed.

    Args:
        rotary: cos and sin of each token's angles, the text's first; None where there are none.
    """
    known = JOINT_ATTENTIONS.get(type(attention.processor).__name__)
    if known is None or not runs_as_written(attention):
        return None
    image = _projection(attention, "to_q", ("norm_q", "norm_k"), x.dtype)
    if image is None or not _fits(rotary, image[2], x, text):
        return None
    layer, norms, channels = image
    streams = [(x, layer, norms)]
    if text is not None:
        of_text = _projection(attention, "add_q_proj", ("norm_added_q", "norm_added_k"), x.dtype)
        if of_text is None or of_text[1][0].eps != norms[0].eps:
            return None
        streams.insert(0 if known.text_first else 1, (text, *of_text[:2]))
    *before, (behind, weights) = ((one(y), tuple(norm.weight for norm in of_one)) for y, one, of_one in streams)
    cos, sin = (None, None) if rotary is None else rotary
    heads, more = layer.out_features // (3 * channels), before[0] if before else ()
    found = known.attend(
        attention.processor, *ops.attention_inputs(behind, weights, cos, sin, heads, norms[0].eps, *more)
    )
    found = found.flatten(2, 3).to(x.dtype)
    if text is None:
        return (found,)
    first, second = found.split([streams[0][0].shape[1], streams[1][0].shape[1]], 1)
    return (second, first) if known.text_first else (first, second)


def _projection(
    attention: nn.Module, name: str, norms: tuple[str, str], dtype: torch.dtype
) -> tuple[QuantLinear, tuple[nn.Module, nn.Module], int] | None:
    """(the layer that makes queries, keys and values at once, the norms of the two first, channels of a head), if all
    are as known.
    """
    layer = joined_at(attention, name)
    query, key = (getattr(attention, norm) for norm in norms)
    if layer is None or not all(_is_plain(norm, dtype) for norm in (query, key)) or query.eps != key.eps:
        return None
    channels = getattr(attention, "head_dim", 0) or layer.out_features // (3 * attention.heads)
    known = channels in CHANNELS and layer.out_features % (3 * channels) == 0
    return (layer, (query, key), channels) if known and query.eps is not None else None


def _is_plain(norm: nn.Module | None, dtype: torch.dtype) -> bool:
    """Whether it is RMSNorm over one axis, without a bias, and does no more."""
    if norm is None or has_hooks(norm) or getattr(norm, "bias", None) is not None:
        return False
    kind = class_before(type(norm))
    if kind.__name__ != "RMSNorm" or kind.__module__.partition(".")[0] not in ("torch", "diffusers"):
        return False
    axes = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim
    return len(axes) == 1 and (norm.weight is None or norm.weight.dtype == dtype)


def _fits(rotary: Rotary | None, channels: int, x: Stream, text: Stream | None) -> bool:
    """Whether ``text`` is of the samples of ``x``, and the angles of one row a token, in fp32 and where ``x`` is."""
    tokens = x.shape[1]
    if text is not None:
        if text.dtype != x.dtype or text.shape[0] != x.shape[0]:
            return False
        tokens += text.shape[1]
    return rotary is None or (
        len(rotary) == 2
        and all(
            part.shape == (tokens, channels) and part.dtype == torch.float32 and part.device == x.device
            for part in rotary
        )
    )


def runs_as_written(attention: nn.Module) -> bool:
    """Whether the processor is diffusers', and nobody has put others in the place of what it calls."""
    known = JOINT_ATTENTIONS.get(type(attention.processor).__name__)
    if known is None:
        return False
    noted = attention.__dict__.get(CODE)
    if torch.compiler.is_compiling():  # which cannot see where code is from
        return noted is not None and noted.is_original
    module, (of_norm, norm) = importlib.import_module(known.module), known.norm
    functions = (
        *(getattr(module, name) for name in known.functions),
        getattr(importlib.import_module(of_norm), norm).forward,
    )
    if noted is not None and noted.is_of(functions):
        return noted.is_original
    *of_diffusers, forward = functions
    is_original = all(is_written_in(one, "diffusers") for one in of_diffusers)
    is_original = is_original and is_written_in(forward, of_norm.partition(".")[0])
    vars(attention)[CODE] = KnownCode(functions, is_original)
    return is_original
