"""Functions of the ops: where something looks, through PyTorch's dispatcher, and past it else. Differentiation stands
outside the ops, in ``torch.autograd.Function``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C import _get_tracing_state, _is_torch_function_mode_enabled, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import contracts
from .backend import asked_backend, backend_of
from .contracts import outside_autocast
from .errors import UnsupportedError
from .operands import check_bias, checked_weight, one_number, side_by_side
from .quantized_input import QuantizedInput
from .tape import again, repeated

_PLAIN = torch.Tensor, nn.Parameter


def _is_seen(x: torch.Tensor) -> bool:
    """Whether something wants to see which ops are called: a compiler, a mode, a transform or a profiler of PyTorch."""
    return (
        is_compiling()
        or type(x) not in _PLAIN
        or x.is_meta
        or _len_torch_dispatch_stack() > 0
        or _is_torch_function_mode_enabled()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def is_differentiated() -> bool:
    """Whether gradients or tangents of what is computed now may be wanted."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _call(name: str, x: torch.Tensor, *others: Any) -> Any:
    """Op ``name`` of ``x``, through PyTorch's dispatcher where something sees it; UnsupportedError where it would be
    differentiated.
    """
    if is_differentiated():
        _refuse_to_differentiate(name, (x, *others))
    if torch.is_grad_enabled() or _is_seen(x):
        return getattr(torch.ops.ditq, name)(x, *others)
    return repeated(contracts.IMPLEMENTATIONS[name], asked_backend(), x, *others)


def _refuse_to_differentiate(name: str, operands: tuple) -> None:
    for one in operands:
        if not isinstance(one, torch.Tensor):
            continue
        # Parameters that could be trained do not say that a gradient is wanted; activations that have one do.
        wanted = torch.is_grad_enabled() and one.requires_grad and not isinstance(one, nn.Parameter)
        if wanted or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(one).tangent is not None):
            raise UnsupportedError(f"{name} is for inference and has no derivative: call layers as they are")


@outside_autocast
def _computed(x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
    """What the ops of :func:`_product` do, without PyTorch's dispatcher, and checked once for both."""
    rows = _rows(x)
    y = _computed_rows(rows, bias, amax, qweight, scale, group_code, weight_format, quantizes_input)
    return _shaped(y, x)


def _computed_rows(rows, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
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


def _shaped(y: torch.Tensor, x: Any) -> torch.Tensor:
    """The product ``y`` [M, N] of :func:`_rows` of ``x`` [..., K], as [..., N]."""
    return y if len(x.shape) == 2 else y.view(*x.shape[:-1], y.shape[1])


def _product(x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
    if not _is_seen(x):
        return repeated(
            _computed, asked_backend(), x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input
        )
    rows = _rows(x)
    if quantizes_input:
        qx, sx = torch.ops.ditq.quantize_activation(rows, amax)
        y = torch.ops.ditq.linear_a8(qx, sx, qweight, scale, group_code, bias, weight_format, x.dtype)
    else:
        y = torch.ops.ditq.linear_a16(rows, qweight, scale, group_code, bias, weight_format)
    return _shaped(y, x)


class _GradInput(torch.autograd.Function):
    """The gradient [M, K] of a product's input, which is a product itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, qweight, scale, group_code, weight_format, in_features):
        return torch.ops.ditq.grad_input(grad, qweight, scale, group_code, weight_format, in_features)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *weight, ctx.weight_format, ctx.in_features = inputs
        ctx.save_for_backward(*weight)
        ctx.save_for_forward(*weight)

    @staticmethod
    def backward(ctx, grad):
        if is_differentiated():
            grad_grad = product(grad, None, None, *ctx.saved_tensors, ctx.weight_format, False)
        else:  # through the dispatcher, which sees batches that nothing here does
            grad_grad = torch.ops.ditq.linear_a16(grad, *ctx.saved_tensors, None, ctx.weight_format)
        return grad_grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        _refuse_second_tangents()
        return _grad_input(tangent, *ctx.saved_tensors, ctx.weight_format, ctx.in_features)


def _refuse_second_tangents() -> None:
    # Of a Function's tangent PyTorch computes none, and says nothing.
    if eager_transforms.JVP_NESTING > 1:
        raise UnsupportedError("a quantized layer has no forward derivative of a forward derivative")


def _grad_input(*operands):
    if is_differentiated() and not is_compiling():
        return _GradInput.apply(*operands)
    return torch.ops.ditq.grad_input(*operands)


class _QuantizedLinear(torch.autograd.Function):
    """``y = x W^T + b`` of ``x`` [M, K] on a packed weight; gradients pass straight through the activation's rounding.
    The result is no view: callers may change it in place.
    """

    forward = staticmethod(_product)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, _, qweight, scale, group_code, weight_format, _ = inputs
        ctx.save_for_backward(qweight, scale, group_code)
        ctx.save_for_forward(qweight, scale, group_code)
        ctx.weight_format, ctx.in_features = weight_format, x.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        qweight, scale, group_code = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_input(grad, qweight, scale, group_code, ctx.weight_format, ctx.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None


class _QuantizedLinearForward(_QuantizedLinear):
    """With tangents, which pass as gradients do. A compiler takes no Function that has any."""

    @staticmethod
    def jvp(ctx, x_tangent, bias_tangent, *_):
        _refuse_second_tangents()
        y = product(x_tangent, None, None, *ctx.saved_tensors, ctx.weight_format, False)
        return y if bias_tangent is None else y + bias_tangent.to(y.dtype)


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
    return product(x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input)


def product(x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input):
    """:func:`quantized_linear` of a floating-point ``x``, in the order of its operands."""
    arguments = (x, bias, amax, qweight, scale, group_code, weight_format, quantizes_input)
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    has_tangent = forward_ad._current_level >= 0
    if has_tangent and is_compiling() and not torch.is_grad_enabled():
        # Compilers lose the tangent there; unless asked for a whole graph, they leave such a layer to Python.
        raise UnsupportedError("a layer that is compiled without gradients has no tangents")
    if has_tangent or (needs_grad and torch.is_grad_enabled()):
        function = _QuantizedLinearForward if has_tangent else _QuantizedLinear
        return _shaped(function.apply(_rows(x), *arguments[1:]), x)
    return _product(*arguments)  # half the Python of a Function that nobody differentiates


def product_again(operands: tuple) -> torch.Tensor | None:
    """:func:`product`, before anything is checked, where a call of the kind was recorded; None where not."""
    if _is_seen(operands[0]) or is_differentiated() or torch._C._is_any_autocast_enabled():
        return None
    return again(_computed, asked_backend(), operands)


def product_of_codes(
    x: QuantizedInput,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    weight_format: str,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`quantized_linear` of ``x`` [..., K] that is quantized already, to [..., N] in ``x.dtype``; for inference.

    Args:
        residual, gate: [..., N] and [samples, N] in ``x.dtype``: the result is ``residual + gate * y``, of the product
            ``y`` as it would be without; samples share the rows, and each has a row of the gate.

    Raises:
        ValueError: if the parts of the weight do not fit each other or the input, or are not contiguous, or if one of
            residual and gate is missing or does not fit.
    """
    operands = qweight, scale, group_code, bias, weight_format, x.dtype
    if gate is not None and is_differentiated():
        gate = gate[:]  # also of a parameter a gradient is wanted, then
    added = () if residual is None and gate is None else (None if residual is None else _rows(residual), gate)
    return _shaped(_call("linear_a8", x.codes, x.scale, *operands, *added), x)


def product_of_silu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    weight_format: str,
) -> torch.Tensor:
    """:func:`quantized_linear` of ``silu(x)``, which is computed as ``x`` [..., K] is loaded and not quantized; for
    inference.

    Raises:
        ValueError: if the parts of the weight do not fit each other or the input, or are not contiguous.
    """
    return _shaped(_call("linear_a16", _rows(x), qweight, scale, group_code, bias, weight_format, True), x)


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
    return _call("quantize_activation", _rows(x), amax)


def gelu_quantize(
    x: torch.Tensor,
    amax: torch.Tensor | None = None,
    approximate: str = "none",
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_activation` of ``gelu(x)``, which stays in fp32 between the two; for inference.

    Args:
        approximate: "none" or "tanh", as in ``torch.nn.functional.gelu``.
        before: [..., J] in ``x.dtype``, columns that stand in front of GELU's as they are: the codes are [M, J + K].

    Raises:
        TypeError: if ``x`` is not floating-point.
        ValueError: for another ``approximate``, an ``amax`` of more than one number, or a ``before`` of other rows.
        UnsupportedError: on the triton backend, for J above 16384.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"activations to quantize must be floating-point, got {x.dtype}")
    return _call("gelu_quantize", _rows(x), amax, approximate, None if before is None else _rows(before))


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
    return _call("norm_modulate", x, weight, bias, shift, scale, eps)


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
    return _call("norm_modulate_quantize", x, weight, bias, shift, scale, amax, eps)


def attention_inputs(
    x: torch.Tensor,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    before: torch.Tensor | None = None,
    before_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [B, S, H, D] of attention, in ``x.dtype``; for inference. Values of one stream are a
    view.

    Args:
        x: [B, T, 3 * H * D], queries, keys and values side by side, as one product makes them.
        norms: RMSNorm's weights [D] of queries and keys, head by head, which are rounded to ``x.dtype`` behind it.
        cos, sin: fp32 [S, D], by which neighbouring channels are turned as points; None turns nothing.
        before: [B, S - T, 3 * H * D], a stream of tokens in front of ``x``, with norms of its own.

    Raises:
        ValueError: if a part does not fit ``x``.
        UnsupportedError: on the triton backend, for D that is no power of two up to 256.
    """
    operands = *norms, cos, sin, heads, eps, *(() if before is None else (before, *before_norms))
    found = _call("attention_inputs", x, *operands).unbind(0)
    return found if before is not None else (*found, x.unflatten(-1, (3, heads, -1)).select(2, 2))
