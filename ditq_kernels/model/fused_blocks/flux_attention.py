"""FLUX's attention in fewer passes: queries and keys normalised and rotated in one, the text's put before the image's;
for the processor that diffusers gives it.
"""

from __future__ import annotations

import torch
from torch import nn

from ...layer import ops
from ...layer.linear import QuantLinear
from ...layer.quantized_input import QuantizedInput
from ...layer.shared_input import has_hooks
from ..shared_projections import KnownCode, is_written_in, joined_at

PROCESSOR = "FluxAttnProcessor"
_CODE = "_ditq_flux_code"  # where an attention keeps a KnownCode
CHANNELS = (16, 32, 64, 128, 256)  # of heads that the kernels take

Rotary = tuple[torch.Tensor, torch.Tensor]


def flux_attention(
    attention: nn.Module,
    rotary: Rotary | None,
    x: torch.Tensor | QuantizedInput,
    text: torch.Tensor | QuantizedInput | None = None,
) -> tuple[torch.Tensor, ...] | None:
    """What attention makes of ``x`` [B, T, K], and of ``text`` in front of it, before the layers behind it: (that of
    ``x``, that of ``text``); None where something else may be computed.
    """
    image = _projection(attention, "to_q", ("norm_q", "norm_k"), x.dtype)
    if image is None or rotary is None or not _fits(rotary, attention.head_dim, x, text):
        return None
    layer, norms = image
    more = ()
    if text is not None:
        of_text = _projection(attention, "add_q_proj", ("norm_added_q", "norm_added_k"), x.dtype)
        if of_text is None or of_text[1][0].eps != norms[0].eps:
            return None
        more = of_text[0](text), tuple(norm.weight for norm in of_text[1])
    from diffusers.models.transformers import transformer_flux

    processor, weights = attention.processor, tuple(norm.weight for norm in norms)
    heads = layer.out_features // (3 * attention.head_dim)
    found = transformer_flux.dispatch_attention_fn(
        *ops.attention_inputs(layer(x), weights, *rotary, heads, norms[0].eps, *more),
        attn_mask=None,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    found = found.flatten(2, 3).to(x.dtype)
    if text is None:
        return (found,)
    return found[:, text.shape[1] :], found[:, : text.shape[1]]


def _projection(
    attention: nn.Module, name: str, norms: tuple[str, str], dtype: torch.dtype
) -> tuple[QuantLinear, tuple[nn.RMSNorm, nn.RMSNorm]] | None:
    """(the layer that makes queries, keys and values at once, the norms of the two first), if all are as known."""
    if attention.head_dim not in CHANNELS or not runs_as_written(attention):
        return None
    layer = joined_at(attention, name)
    query, key = (getattr(attention, norm) for norm in norms)
    known = layer is not None and layer.out_features % (3 * attention.head_dim) == 0
    if not (known and all(_is_plain(norm, dtype) for norm in (query, key)) and query.eps == key.eps is not None):
        return None
    return layer, (query, key)


def _is_plain(norm: nn.Module, dtype: torch.dtype) -> bool:
    if type(norm) is not nn.RMSNorm or has_hooks(norm) or len(norm.normalized_shape) != 1:
        return False
    return norm.weight is None or norm.weight.dtype == dtype


def _fits(
    rotary: Rotary, channels: int, x: torch.Tensor | QuantizedInput, text: torch.Tensor | QuantizedInput | None
) -> bool:
    """Whether ``text`` is of the samples of ``x``, and the angles of one row a token, in fp32 and where ``x`` is."""
    tokens = x.shape[1]
    if text is not None:
        if text.dtype != x.dtype or text.shape[0] != x.shape[0]:
            return False
        tokens += text.shape[1]
    return len(rotary) == 2 and all(
        part.shape == (tokens, channels) and part.dtype == torch.float32 and part.device == x.device for part in rotary
    )


def runs_as_written(attention: nn.Module) -> bool:
    """Whether the processor is diffusers', and nobody has put others in the place of the functions that it calls and
    this file does not.
    """
    if type(attention.processor).__name__ != PROCESSOR:
        return False
    from diffusers.models.transformers import transformer_flux

    functions = (
        *(transformer_flux._get_qkv_projections, transformer_flux._get_projections),
        *(transformer_flux.apply_rotary_emb, nn.RMSNorm.forward),
    )
    known = attention.__dict__.get(_CODE)
    if known is not None and known.is_of(functions):
        return known.is_original
    if torch.compiler.is_compiling():  # which cannot see where code is from
        return False
    *of_diffusers, norm = functions
    is_original = all(is_written_in(one, "diffusers") for one in of_diffusers) and is_written_in(norm, "torch")
    vars(attention)[_CODE] = KnownCode(functions, is_original)
    return is_original
