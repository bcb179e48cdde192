"""What every op means, in plain PyTorch. It is also the implementation for CPU tensors.

Numerics (the same on every backend): activation codes are ``rint(x * (127 / amax))``, ties to even, with IEEE division;
int32 accumulators are exact; then, in fp32 and in this order, ``acc * sx * scale + bias``, and one rounding to the
output dtype.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .formats import INT8_MAX, WeightFormat
from .gated_residual import GatedResidual
from .packed_weight import PackedWeight
from .packing import LAYOUTS, unpack_groups

# Rows that reach no further than this are quantized as if they did: 127 / amax stays finite, and a row of zeros needs
# no case of its own.
SMALLEST_AMAX = 2.0**-100
# A product of int8 codes over at most this many inputs stays below 2**24, so that fp32 holds every partial sum exactly.
EXACT_FP32_INPUTS = 1024


def quantize_activation(x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, K] to int8 codes [M, K] and fp32 scales [M].

    ``amax``, fp32 [1], is the calibrated largest magnitude of the whole tensor, beyond which codes saturate; None finds
    one per row. A row that holds NaN or an infinity gets codes 0 and the scale NaN, so that its output row is NaN.
    """
    x = x.to(torch.float32)
    low, high = torch.aminmax(x, dim=1)
    row_amax = torch.maximum(-low, high)
    finite = torch.isfinite(row_amax)
    reach = (row_amax if amax is None else amax.expand_as(row_amax)).clamp(min=SMALLEST_AMAX)
    # Division by or of a Python number may become a product with a rounded reciprocal; of two tensors it is IEEE
    # division.
    largest = torch.full_like(reach, INT8_MAX)
    codes = (x * (largest / reach).unsqueeze(1)).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    codes[~finite] = 0
    return codes, torch.where(finite, reach / largest, torch.nan)


def gelu_quantize(
    x: torch.Tensor,
    amax: torch.Tensor | None = None,
    approximate: str = "none",
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_activation` of GELU of ``x`` [M, K], which stays in fp32 between the two. ``approximate`` is
    "none" or "tanh", as in ``torch.nn.functional.gelu``. ``before`` [M, J]: columns in front of GELU's, as they are.
    """
    y = F.gelu(x.to(torch.float32), approximate=approximate)
    return quantize_activation(y if before is None else torch.cat([before.to(torch.float32), y], 1), amax)


def _norm_modulate_fp32(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    weight, bias, shift, scale = (
        None if part is None else part.to(torch.float32) for part in (weight, bias, shift, scale)
    )
    y = F.layer_norm(x.to(torch.float32), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.unsqueeze(1))
    return y if shift is None else y + shift.unsqueeze(1)


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` in ``x.dtype``, computed in fp32: ``x`` [B, T, K]; ``weight`` and
    ``bias`` [K] of the norm, ``shift`` and ``scale`` [B, K], each optional.
    """
    return _norm_modulate_fp32(x, weight, bias, shift, scale, eps).to(x.dtype)


def norm_modulate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_activation` of :func:`norm_modulate`, which stays in fp32 between the two: codes [B * T, K] and
    scales [B * T].
    """
    return quantize_activation(_norm_modulate_fp32(x, weight, bias, shift, scale, eps).flatten(0, 1), amax)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` [B, S, H, D], neighbours among the channels taken for a point and turned by their angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(3)
    cos, sin = (part[None, :, None, :] for part in (cos, sin))
    return (x.to(torch.float32) * cos + turned.to(torch.float32) * sin).to(x.dtype)


def attention_inputs(
    x: torch.Tensor,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    before: torch.Tensor | None = None,
    before_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """Queries, keys and, with ``before``, values of attention, [2 or 3, B, S, H, D]: of ``x`` [B, T, 3 * H * D], q, k
    and v side by side, behind those of ``before``. Queries and keys are normalised head by head (RMSNorm with the
    weights ``norms``, rounded to ``x.dtype``) and rotated by ``cos`` and ``sin``, fp32 [S, D], where they are there (Su
    et al., arXiv 2104.09864; neighbours form the pairs, and each of a pair has its own factors).
    """
    streams = ((x, norms),) if before is None else ((before, before_norms), (x, norms))
    parts = []
    for stream, of_stream in streams:
        *normed, value = stream.unflatten(-1, (3, heads, -1)).unbind(2)
        channels = value.shape[-1:]
        parts.append([F.rms_norm(y, channels, norm, eps) for y, norm in zip(normed, of_stream, strict=True)] + [value])
    query, key, value = (torch.cat(of_streams, 1) for of_streams in zip(*parts, strict=True))
    rotated = [query, key] if cos is None else [_rotated(query, cos, sin), _rotated(key, cos, sin)]
    return torch.stack(rotated if before is None else [*rotated, value])


def decode(weight: PackedWeight) -> torch.Tensor:
    """The integers, int8 [N, K], that the kernels multiply by: codes as stored, or ``m * (u - z)`` of two-level
    formats.
    """
    codes = LAYOUTS[weight.fmt.layout].unpack(weight.qweight, weight.in_features)
    if not weight.fmt.two_level:
        return codes
    groups = unpack_groups(weight.group_code)
    multiplier, zero_point = (_per_input(part, weight.fmt, weight.in_features).to(torch.int16) for part in groups)
    return (multiplier * (codes.to(torch.int16) - zero_point)).to(torch.int8)


def _per_input(parameters: torch.Tensor, fmt: WeightFormat, in_features: int) -> torch.Tensor:
    """Group parameters [groups, N] spread to [N, K]."""
    if fmt.group is None:
        return parameters.T.expand(-1, in_features)
    return parameters.T.repeat_interleave(fmt.group, 1)[:, :in_features]


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """fp32 [N, K]: integers times scales, exactly what the kernels multiply by."""
    scale, fmt = weight.scale, weight.fmt
    scales = _per_input(scale, fmt, weight.in_features) if fmt.promoted else scale.unsqueeze(1)
    return decode(weight).to(torch.float32) * scales


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether this machine's int8 product does not saturate on the way (some instruction sets add pairs of products in
    16 bits).
    """
    x = torch.full((32, 64), INT8_MAX, dtype=torch.int8)
    w = torch.full((16, 64), -INT8_MAX - 1, dtype=torch.int8)
    try:
        return torch.equal(
            torch._int_mm(x, w.T), torch.full((32, 16), -64 * INT8_MAX * (INT8_MAX + 1), dtype=torch.int32)
        )
    except RuntimeError:
        return False


@functools.cache
def _int_mm_is_fast() -> bool:
    """Whether the CPU has instructions for products of int8. Without them PyTorch's is the slower one: on an EPYC with
    AVX2 alone, 8 to 14 times slower than through fp32. (A PyTorch that does not tell is trusted.)
    """
    return getattr(torch.cpu, "_is_vnni_supported", lambda: True)()


def int8_product(qx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times int8 [N, K] transposed: exact int32 [M, N]."""
    takes_int8 = qx.device.type == "cpu" and _int_mm_is_fast() and _int_mm_is_exact()
    # One column goes wrong: PyTorch 2.11 takes it at another stride than it has, on a CPU with AMX.
    if takes_int8 and qx.shape[1] > 1 and qx.numel() and w.numel():
        return torch._int_mm(qx, w.T)
    total = qx.new_zeros((qx.shape[0], w.shape[0]), dtype=torch.int32)
    for start in range(0, qx.shape[1], EXACT_FP32_INPUTS):
        columns = slice(start, start + EXACT_FP32_INPUTS)
        total += (qx[:, columns].to(torch.float32) @ w[:, columns].to(torch.float32).T).to(torch.int32)
    return total


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    added: GatedResidual | None = None,
) -> torch.Tensor:
    """[M, N] in ``out_dtype``; with ``torch.int32`` the raw accumulators, of formats that have them. ``added``: what
    the product is added to, once it is rounded.
    """
    if added is not None:
        y = linear_a8(qx, sx, weight, bias, out_dtype).to(torch.float32)
        gate = added.gate.to(torch.float32).repeat_interleave(len(added.residual) // len(added.gate), 0)
        return (added.residual.to(torch.float32) + gate * y).to(out_dtype)
    w, scale, fmt = decode(weight), weight.scale, weight.fmt
    if fmt.promoted:
        total = torch.zeros((qx.shape[0], w.shape[0]), dtype=torch.float32, device=qx.device)
        for index, start in enumerate(range(0, weight.in_features, fmt.group)):
            columns = slice(start, start + fmt.group)
            total += (
                int8_product(qx[:, columns].contiguous(), w[:, columns].contiguous()).to(torch.float32) * scale[index]
            )
        y = total * sx.unsqueeze(1)
    else:
        accumulator = int8_product(qx, w)
        if out_dtype == torch.int32:
            return accumulator
        y = accumulator.to(torch.float32).mul_(sx.unsqueeze(1)).mul_(scale)
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(out_dtype)


def quantized_linear(
    x: torch.Tensor, amax: torch.Tensor | None, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """:func:`linear_a8` of :func:`quantize_activation`: [M, N] in the dtype of ``x`` [M, K]."""
    qx, sx = quantize_activation(x, amax)
    return linear_a8(qx, sx, weight, bias, x.dtype)


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
) -> torch.Tensor:
    """``x`` [M, K], or SiLU of it rounded to its dtype, to [M, N] in ``x.dtype``, computed in fp32."""
    if silu:
        x = F.silu(x)
    bias = None if bias is None else bias.to(torch.float32)
    return F.linear(x.to(torch.float32), dequantize(weight), bias).to(x.dtype)


def grad_input(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``grad`` [M, N] to [M, K] in ``grad.dtype``: the product with the dequantized weight, computed in fp32."""
    return (grad.to(torch.float32) @ dequantize(weight)).to(grad.dtype)
