"""Op contracts: each op is declared once with ``torch.library`` (schema and fake). Its implementation checks what it is
given and picks the backend at run time, so that graphs captured by ``torch.compile`` do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .backend import backend_of
from .errors import UnsupportedError
from .formats import check_int8_inputs
from .operands import (
    check_before,
    check_bias,
    check_devices,
    check_heads,
    check_norm,
    checked_residual,
    checked_weight,
    elsewhere,
    no_matrix,
    one_number,
    side_by_side,
)

GELU_FORMS = ("none", "tanh")  # as torch.nn.functional.gelu names them

_WEIGHT = "Tensor qweight, Tensor scale, Tensor? group_code"
_NORM = "Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale"
_library = torch.library.Library("ditq", "DEF")
_library.define("quantize_activation(Tensor x, Tensor? amax) -> (Tensor, Tensor)")
_library.define("gelu_quantize(Tensor x, Tensor? amax, str approximate, Tensor? before=None) -> (Tensor, Tensor)")
_library.define(f"norm_modulate(Tensor x, {_NORM}, float eps) -> Tensor")
_library.define(f"norm_modulate_quantize(Tensor x, {_NORM}, Tensor? amax, float eps) -> (Tensor, Tensor)")
_library.define(
    "attention_inputs(Tensor x, Tensor? query_norm, Tensor? key_norm, Tensor? cos, Tensor? sin, int heads, float eps, "
    "Tensor? before=None, Tensor? before_query_norm=None, Tensor? before_key_norm=None) -> Tensor"
)
_library.define(
    f"linear_a8(Tensor qx, Tensor sx, {_WEIGHT}, Tensor? bias, str weight_format, ScalarType out_dtype, "
    "Tensor? residual=None, Tensor? gate=None) -> Tensor"
)
_library.define(f"linear_a16(Tensor x, {_WEIGHT}, Tensor? bias, str weight_format, bool silu=False) -> Tensor")
_library.define(f"grad_input(Tensor grad, {_WEIGHT}, str weight_format, int in_features) -> Tensor")


def _quantize_activation(x: torch.Tensor, amax: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 2:
        raise no_matrix(x)
    amax = None if amax is None else one_number(amax, x.device)
    return backend_of(x.device).quantize_activation(x, amax)


def _gelu_quantize(x, amax, approximate, before=None):
    if approximate not in GELU_FORMS:
        raise ValueError(f"unknown GELU approximation {approximate!r}; allowed: {', '.join(GELU_FORMS)}")
    if x.dim() != 2:
        raise no_matrix(x)
    amax = None if amax is None else one_number(amax, x.device)
    if before is not None:
        check_before(before, x)
    return backend_of(x.device).gelu_quantize(x, amax, approximate, before)


def _norm_modulate(x, weight, bias, shift, scale, eps):
    check_norm(x, weight, bias, shift, scale)
    norm = side_by_side(weight), side_by_side(bias)
    return backend_of(x.device).norm_modulate(x, *norm, shift, scale, eps)


def _norm_modulate_quantize(x, weight, bias, shift, scale, amax, eps):
    check_norm(x, weight, bias, shift, scale)
    amax = None if amax is None else one_number(amax, x.device)
    norm = side_by_side(weight), side_by_side(bias)
    return backend_of(x.device).norm_modulate_quantize(x, *norm, shift, scale, amax, eps)


def _attention_inputs(
    x, query_norm, key_norm, cos, sin, heads, eps, before=None, before_query_norm=None, before_key_norm=None
):
    norms = query_norm, key_norm, before_query_norm, before_key_norm
    check_heads(x, norms, cos, sin, heads, before)
    query_norm, key_norm, *before_norms = map(side_by_side, norms)
    x, before = (one if one is None or one.stride(2) == 1 else one.contiguous() for one in (x, before))
    turning = side_by_side(cos), side_by_side(sin)
    return backend_of(x.device).attention_inputs(
        x, (query_norm, key_norm), *turning, heads, eps, before, tuple(before_norms)
    )


def _linear_a8(qx, sx, qweight, scale, group_code, bias, weight_format, out_dtype, residual=None, gate=None):
    if qx.dim() != 2:
        raise no_matrix(qx)
    weight = checked_weight(qx.shape[1], qx.device, qweight, scale, group_code, weight_format)
    check_int8_inputs(weight.in_features, weight.fmt)
    if out_dtype == torch.int32 and weight.fmt.promoted:
        raise UnsupportedError(
            f"{weight_format} has no single int32 accumulator: its groups are scaled in fp32; "
            "ask for a floating-point dtype"
        )
    if qx.dtype != torch.int8 or sx.dtype != torch.float32 or sx.shape != qx.shape[:1]:
        found = f"{qx.dtype} {list(qx.shape)} and {sx.dtype} {list(sx.shape)}"
        raise ValueError(f"codes must be torch.int8 [M, K] and their scales torch.float32 [M], got {found}")
    if sx.device != qx.device:
        raise elsewhere("sx", sx, qx.device)
    if bias is not None:
        check_bias(bias, qweight)
    sx, bias = side_by_side(sx), side_by_side(bias)
    added = checked_residual(residual, gate, (qx.shape[0], weight.out_features), out_dtype, qx.device)
    return backend_of(qx.device).linear_a8(qx, sx, weight, bias, out_dtype, added=added)


def _linear_a16(x, qweight, scale, group_code, bias, weight_format, silu=False):
    if x.dim() != 2:
        raise no_matrix(x)
    weight = checked_weight(x.shape[1], x.device, qweight, scale, group_code, weight_format)
    if bias is not None:
        check_bias(bias, qweight)
    return backend_of(x.device).linear_a16(x, weight, side_by_side(bias), silu)


def _grad_input(grad, qweight, scale, group_code, weight_format, in_features):
    if grad.dim() != 2:
        raise no_matrix(grad)
    weight = checked_weight(in_features, grad.device, qweight, scale, group_code, weight_format)
    return backend_of(grad.device).grad_input(grad, weight)


# An operand on meta, whatever the others are on, brings a call here.
def _norm_modulate_fake(x, weight, bias, shift, scale, eps):
    check_devices(x.device, weight=weight, bias=bias, shift=shift, scale=scale)
    return x.new_empty(x.shape)


def _norm_modulate_quantize_fake(x, weight, bias, shift, scale, amax, eps):
    check_devices(x.device, weight=weight, bias=bias, shift=shift, scale=scale)
    rows = x.shape[0] * x.shape[1]
    return x.new_empty((rows, x.shape[2]), dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


def _attention_inputs_fake(
    x, query_norm, key_norm, cos, sin, heads, eps, before=None, before_query_norm=None, before_key_norm=None
):
    check_devices(x.device, query_norm=query_norm, key_norm=key_norm, cos=cos, sin=sin, before=before)
    first, parts = (0, 2) if before is None else (before.shape[1], 3)
    return x.new_empty((parts, x.shape[0], first + x.shape[1], heads, x.shape[2] // (3 * heads)))


def _gelu_quantize_fake(x, amax, approximate, before=None):
    check_devices(x.device, before=before)
    codes, scales = _quantize_activation_fake(x, amax)
    return codes if before is None else x.new_empty((len(x), before.shape[1] + x.shape[1]), dtype=torch.int8), scales


def _quantize_activation_fake(x, amax):
    if amax is not None:
        one_number(amax, x.device)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _linear_a8_fake(qx, sx, qweight, scale, group_code, bias, weight_format, out_dtype, residual=None, gate=None):
    check_devices(qx.device, sx=sx, qweight=qweight, scale=scale, group_code=group_code, residual=residual, gate=gate)
    if bias is not None:
        check_bias(bias, qweight)
    return qx.new_empty((qx.shape[0], qweight.shape[0]), dtype=out_dtype)


def _linear_a16_fake(x, qweight, scale, group_code, bias, weight_format, silu=False):
    check_devices(x.device, qweight=qweight, scale=scale, group_code=group_code)
    if bias is not None:
        check_bias(bias, qweight)
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _grad_input_fake(grad, qweight, scale, group_code, weight_format, in_features):
    check_devices(grad.device, qweight=qweight, scale=scale, group_code=group_code)
    return grad.new_empty((grad.shape[0], in_features))


def outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's arithmetic is stated; autocast, which would have products within it in 16 bits, ends at its door."""

    @functools.wraps(implementation)
    def computed(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return implementation(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return implementation(*args, **kwargs)

    return computed


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
for _name, _implementation, _fake in (
    ("quantize_activation", _quantize_activation, _quantize_activation_fake),
    ("gelu_quantize", _gelu_quantize, _gelu_quantize_fake),
    ("norm_modulate", _norm_modulate, _norm_modulate_fake),
    ("norm_modulate_quantize", _norm_modulate_quantize, _norm_modulate_quantize_fake),
    ("attention_inputs", _attention_inputs, _attention_inputs_fake),
    ("linear_a8", _linear_a8, _linear_a8_fake),
    ("linear_a16", _linear_a16, _linear_a16_fake),
    ("grad_input", _grad_input, _grad_input_fake),
):
    IMPLEMENTATIONS[_name] = outside_autocast(_implementation)
    _library.impl(_name, IMPLEMENTATIONS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditq::{_name}", _fake, lib=_library)
