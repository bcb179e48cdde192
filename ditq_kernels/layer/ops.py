"""Op contracts, dispatch to a backend, and differentiable functions outside the ops.

Each op is declared once with ``torch.library`` (schema and fake). Its implementation picks the backend at run time, so
that graphs captured by
``torch.compile`` do not depend on it. Differentiation stands outside, in ``torch.autograd.Function``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backend import backend_of
from .errors import UnsupportedError
from .operands import (
    check_bias,
    check_devices,
    check_norm,
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
_library.define("gelu_quantize(Tensor x, Tensor? amax, str approximate) -> (Tensor, Tensor)")
_library.define(f"norm_modulate(Tensor x, {_NORM}, float eps) -> Tensor")
_library.define(f"norm_modulate_quantize(Tensor x, {_NORM}, Tensor? amax, float eps) -> (Tensor, Tensor)")
_library.define(
    f"linear_a8(Tensor qx, Tensor sx, {_WEIGHT}, Tensor? bias, str weight_format, ScalarType out_dtype) -> Tensor"
)
_library.define(f"linear_a16(Tensor x, {_WEIGHT}, Tensor? bias, str weight_format, bool silu=False) -> Tensor")
_library.define(f"grad_input(Tensor grad, {_WEIGHT}, str weight_format, int in_features) -> Tensor")


def _quantize_activation(x: torch.Tensor, amax: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 2:
        raise no_matrix(x)
    amax = None if amax is None else one_number(amax, x.device)
    return backend_of(x.device).quantize_activation(x, amax)


def _gelu_quantize(x, amax, approximate):
    if approximate not in GELU_FORMS:
        raise ValueError(f"unknown GELU approximation {approximate!r}; allowed: {', '.join(GELU_FORMS)}")
    if x.dim() != 2:
        raise no_matrix(x)
    amax = None if amax is None else one_number(amax, x.device)
    return backend_of(x.device).gelu_quantize(x, amax, approximate)


def _norm_modulate(x, weight, bias, shift, scale, eps):
    check_norm(x, weight, bias, shift, scale)
    norm = side_by_side(weight), side_by_side(bias)
    return backend_of(x.device).norm_modulate(x, *norm, shift, scale, eps)


def _norm_modulate_quantize(x, weight, bias, shift, scale, amax, eps):
    check_norm(x, weight, bias, shift, scale)
    amax = None if amax is None else one_number(amax, x.device)
    norm = side_by_side(weight), side_by_side(bias)
    return backend_of(x.device).norm_modulate_quantize(x, *norm, shift, scale, amax, eps)


def _linear_a8(qx, sx, qweight, scale, group_code, bias, weight_format, out_dtype):
    if qx.dim() != 2:
        raise no_matrix(qx)
    weight = checked_weight(qx.shape[1], qx.device, qweight, scale, group_code, weight_format)
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
    return backend_of(qx.device).linear_a8(qx, sx, weight, bias, out_dtype)


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


def _gelu_quantize_fake(x, amax, approximate):
    return _quantize_activation_fake(x, amax)


def _quantize_activation_fake(x, amax):
    if amax is not None:
        one_number(amax, x.device)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _linear_a8_fake(qx, sx, qweight, scale, group_code, bias, weight_format, out_dtype):
    check_devices(qx.device, sx=sx, qweight=qweight, scale=scale, group_code=group_code)
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


def _outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's arithmetic is stated; autocast, which would have products within it in 16 bits, ends at its door."""

    @functools.wraps(implementation)
    def computed(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return implementation(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return implementation(*args, **kwargs)

    return computed


for _name, _implementation, _fake in (
    ("quantize_activation", _quantize_activation, _quantize_activation_fake),
    ("gelu_quantize", _gelu_quantize, _gelu_quantize_fake),
    ("norm_modulate", _norm_modulate, _norm_modulate_fake),
    ("norm_modulate_quantize", _norm_modulate_quantize, _norm_modulate_quantize_fake),
    ("linear_a8", _linear_a8, _linear_a8_fake),
    ("linear_a16", _linear_a16, _linear_a16_fake),
    ("grad_input", _grad_input, _grad_input_fake),
):
    _library.impl(_name, _outside_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditq::{_name}", _fake, lib=_library)


def _is_seen(x: torch.Tensor) -> bool:
    """Whether something wants to see which ops are called: a compiler, a mode, a transform or a profiler of PyTorch."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (torch.Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


@_outside_autocast
def _computed(rows, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
    """What the ops of :func:`_product` do, without PyTorch's dispatcher, and checked once for both."""
    weight = checked_weight(rows.shape[1], rows.device, qweight, scale, group_code, weight_format)
    if bias is not None:
        check_bias(bias, qweight)
    bias, backend = side_by_side(bias), backend_of(rows.device)
    if not quantizes_input:
        return backend.linear_a16(rows, weight, bias)
    amax = None if amax is None else one_number(amax, rows.device)
    if hasattr(backend, "quantized_linear"):  # both at once
        return backend.quantized_linear(rows, amax, weight, bias)
    return backend.linear_a8(*backend.quantize_activation(rows, amax), weight, bias, rows.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1])


def _product(x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
    rows = _rows(x)
    if not _is_seen(x):
        y = _computed(rows, bias, amax, qweight, scale, group_code, weight_format, quantizes_input)
    elif quantizes_input:
        qx, sx = torch.ops.ditq.quantize_activation(rows, amax)
        y = torch.ops.ditq.linear_a8(qx, sx, qweight, scale, group_code, bias, weight_format, x.dtype)
    else:
        y = torch.ops.ditq.linear_a16(rows, qweight, scale, group_code, bias, weight_format)
    return y.view(*x.shape[:-1], qweight.shape[0])


class _QuantizedLinear(torch.autograd.Function):
    """``y = x W^T + b`` on a packed weight; the gradient passes straight through the activation's rounding."""

    forward = staticmethod(_product)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, _, qweight, scale, group_code, weight_format, _ = inputs
        ctx.save_for_backward(qweight, scale, group_code)
        ctx.weight_format, ctx.input_shape = weight_format, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        qweight, scale, group_code = ctx.saved_tensors
        rows = _rows(grad)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.ditq.grad_input(rows, qweight, scale, group_code, ctx.weight_format, ctx.input_shape[-1])
            grad_x = grad_x.view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    weight_format: str,
    quantizes_input: bool,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [..., K] times a packed weight, to [..., N] in ``x.dtype``; differentiable in ``x`` and ``bias``.

    Args:
        qweight, scale, group_code: the stored weight, as :mod:`ditq_kernels.layer.packing` lays it out.
        bias: [N], any float dtype; added in fp32.
        weight_format: a key of :data:`ditq_kernels.layer.formats.WEIGHT_FORMATS`.
        quantizes_input: whether the input is rounded to int8 first.
        amax: fp32 [1], the calibrated reach of the input; None finds one per row.

    Raises:
        TypeError: if ``x`` is not floating-point.
        ValueError: if the parts of the weight do not fit each other or the input, or are not contiguous.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"the input must be floating-point, got {x.dtype}")
    arguments = (x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input)
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _QuantizedLinear.apply(*arguments)
    return _product(*arguments)  # half the Python of a Function that nobody differentiates


def quantize_activation(x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K], any float dtype, to int8 codes [M, K] and fp32 scales [M], one row per token.

    Per token, ``amax = max |x|`` in fp32, ``code = rint(x * (127 / amax))`` with ties to even, ``scale = amax / 127``.
    A calibrated ``amax`` (fp32 [1]) takes the place of the row's; codes then saturate. A row with NaN or an infinity
    gets the scale NaN.

    Raises:
        TypeError: if ``x`` is not floating-point.
        ValueError: if ``amax`` holds more than one number.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"activations to quantize must be floating-point, got {x.dtype}")
    return torch.ops.ditq.quantize_activation(_rows(x), amax)


def gelu_quantize(
    x: torch.Tensor, amax: torch.Tensor | None = None, approximate: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_activation` of ``gelu(x)``, which stays in fp32 between the two; for inference.

    Args:
        approximate: "none" or "tanh", as in ``torch.nn.functional.gelu``.

    Raises:
        TypeError: if ``x`` is not floating-point.
        ValueError: for another ``approximate``, or an ``amax`` of more than one number.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"activations to quantize must be floating-point, got {x.dtype}")
    return torch.ops.ditq.gelu_quantize(_rows(x), amax, approximate)


def norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``layer_norm(x) * (1 + scale) + shift``, [B, T, K] in ``x.dtype``, in fp32 with one rounding; for inference.

    Args:
        x: [B, T, K].
        shift, scale: [B, K], one row per sample, as adaLN makes them.
        weight, bias: [K], of the norm.

    Raises:
        ValueError: if a part does not fit ``x``.
        UnsupportedError: on the triton backend, for K above 16384.
    """
    return torch.ops.ditq.norm_modulate(x, weight, bias, shift, scale, eps)


def norm_modulate_quantize(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_activation` of :func:`norm_modulate`, which stays in fp32 between the two: int8 codes [B * T, K]
    and fp32 scales [B * T].

    Raises:
        ValueError: if a part does not fit ``x``, or ``amax`` holds more than one number.
        UnsupportedError: on the triton backend, for K above 16384.
    """
    return torch.ops.ditq.norm_modulate_quantize(x, weight, bias, shift, scale, amax, eps)
