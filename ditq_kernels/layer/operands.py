"""What an op is given, checked: a ValueError names what does not fit.

Nothing is read before it is known to be there. Functions are called on the way to an error alone, where they can be: a
call costs a tenth of a launch.
"""

from __future__ import annotations

import functools

import torch

from .formats import WEIGHT_FORMATS, WeightFormat
from .gated_residual import GatedResidual
from .packed_weight import PackedWeight
from .packing import LAYOUTS


@functools.lru_cache(maxsize=4096)
def _expected_parts(
    fmt: WeightFormat, out_features: int, in_features: int
) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
    """(name, dtype, shape) of what is stored of an [N, K] weight, the group bytes last where there are any."""
    layout = LAYOUTS[fmt.layout]
    parts = (
        ("qweight", layout.dtype, (out_features, layout.columns(in_features))),
        ("scale", torch.float32, fmt.scale_shape(out_features, in_features)),
    )
    if fmt.two_level:
        parts += (("group_code", torch.uint8, (fmt.group_count(in_features), out_features)),)
    return parts


def checked_weight(
    in_features: int,
    device: torch.device,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None,
    weight_format: str,
) -> PackedWeight:
    """The stored weight, whose parts fit each other, the input's width and its device; ValueError otherwise."""
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"unknown weight format {weight_format!r}; allowed: {', '.join(WEIGHT_FORMATS)}")
    fmt = WEIGHT_FORMATS[weight_format]
    if fmt.two_level != (group_code is not None):
        raise ValueError(f"{weight_format} weights {'need' if fmt.two_level else 'have no'} group_code")
    parts = (qweight, scale, group_code)
    for tensor, (name, dtype, shape) in zip(parts, _expected_parts(fmt, qweight.shape[0], in_features), strict=False):
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"{name} of a {weight_format} weight with K = {in_features} must be {dtype} {list(shape)}, got {found}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the input is on {device}; move the layer or the input")
        if not tensor.is_contiguous():  # a copy at every call would cost more than the product of few rows
            raise ValueError(
                f"{name} must be contiguous, got strides {list(tensor.stride())}; keep {name}.contiguous()"
            )
    return PackedWeight(*parts, fmt, in_features)


def side_by_side(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A vector whose neighbours are neighbours in memory, as kernels read it: itself, or a copy."""
    return None if tensor is None else tensor.contiguous()


def no_matrix(x: torch.Tensor) -> ValueError:
    return ValueError(f"the input must be [M, K], got {list(x.shape)}")


def elsewhere(name: str, tensor: torch.Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name} is on {tensor.device} but the input is on {device}; move one of them")


def check_bias(bias: torch.Tensor, qweight: torch.Tensor) -> None:
    if bias.shape != qweight.shape[:1]:
        raise ValueError(f"bias must be [{qweight.shape[0]}], one value per output, got {list(bias.shape)}")
    if bias.device != qweight.device:
        raise elsewhere("bias", bias, qweight.device)


def check_before(before: torch.Tensor, x: torch.Tensor) -> None:
    """ValueError unless ``before`` holds columns that can stand in front of those of ``x`` [M, K]."""
    if before.dim() != 2 or len(before) != len(x) or before.dtype != x.dtype:
        found = f"{before.dtype} {list(before.shape)}"
        raise ValueError(f"before must be {x.dtype} [{len(x)}, J], rows of the input, got {found}")
    if before.device != x.device:
        raise elsewhere("before", before, x.device)


def checked_residual(
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> GatedResidual | None:
    """What a product of ``shape`` is added to, with neighbours side by side; ValueError if the parts do not fit."""
    if residual is None and gate is None:
        return None
    if residual is None or gate is None:
        raise ValueError("a residual comes with a gate, and a gate with a residual")
    if residual.shape != shape or residual.dtype != dtype or not dtype.is_floating_point:
        found = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"the residual must be {dtype} {list(shape)}, as the product is, and a float; got {found}")
    fits = gate.dim() == 2 and gate.shape[1] == shape[1] and len(gate) and shape[0] % len(gate) == 0
    if not fits or gate.dtype != dtype:
        found = f"{gate.dtype} {list(gate.shape)}"
        raise ValueError(f"the gate must be {dtype} [samples, {shape[1]}], samples that share the rows; got {found}")
    check_devices(device, residual=residual, gate=gate)
    return GatedResidual(*(part if part.stride(1) == 1 else part.contiguous() for part in (residual, gate)))


def one_number(amax: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``amax`` as fp32 [1]; ValueError if it holds another number of numbers, or is elsewhere."""
    if amax.numel() != 1:
        raise ValueError(f"amax must hold one number, the calibrated reach of the whole input, got {list(amax.shape)}")
    if amax.device != device:
        raise elsewhere("amax", amax, device)
    return amax.reshape(1).to(torch.float32)


def check_devices(device: torch.device, **parts: torch.Tensor | None) -> None:
    """ValueError unless all ``parts`` that are there are on the input's ``device``."""
    for name, tensor in parts.items():
        if tensor is not None and tensor.device != device:
            raise elsewhere(name, tensor, device)


def check_norm(x, weight, bias, shift, scale) -> None:
    """ValueError unless the parts of a modulated norm are where ``x`` [B, T, K] is, and fit it."""
    check_devices(x.device, weight=weight, bias=bias, shift=shift, scale=scale)
    if x.dim() != 3:
        raise ValueError(f"x must be [batch, tokens, channels], got {list(x.shape)}")
    batch, _, columns = x.shape
    for name, tensor, shape in (
        ("weight", weight, (columns,)),
        ("bias", bias, (columns,)),
        ("shift", shift, (batch, columns)),
        ("scale", scale, (batch, columns)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")


def check_heads(x, norms, cos, sin, heads, before) -> None:
    """ValueError unless queries, keys and values of ``heads`` heads stand side by side in ``x`` [B, T, 3 * H * D] and
    ``before``, and all else is where they are and fits them.
    """
    names = ("query_norm", "key_norm", "before_query_norm", "before_key_norm")
    check_devices(x.device, cos=cos, sin=sin, before=before, **dict(zip(names, norms, strict=True)))
    if x.dim() != 3 or heads < 1 or x.shape[2] % (6 * heads):
        raise ValueError(f"x must be [batch, tokens, 3 * {heads} heads * an even number], got {list(x.shape)}")
    batch, tokens, columns = x.shape
    if before is not None:
        if before.dim() != 3 or (len(before), before.shape[2]) != (batch, columns) or before.dtype != x.dtype:
            found = f"{before.dtype} {list(before.shape)}"
            raise ValueError(f"before must be {x.dtype} [{batch}, tokens, {columns}], as x is, got {found}")
        tokens += before.shape[1]
    channels = columns // (3 * heads)
    if (cos is None) != (sin is None):
        raise ValueError("cos comes with sin, and sin with cos")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None and (tensor.shape != (tokens, channels) or tensor.dtype != torch.float32):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} must be torch.float32 [{tokens}, {channels}], a row for each token, got {found}")
    for name, tensor in zip(names, norms, strict=True):
        if tensor is not None and (tensor.shape != (channels,) or tensor.dtype != x.dtype):
            raise ValueError(f"{name} must be {x.dtype} [{channels}], got {tensor.dtype} {list(tensor.shape)}")
