"""Passes around products: quantization, alone and behind GELU or norms; expansion; the input's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...kernels import activation, expansion, gradient, heads
from ...kernels.config import GRADIENT_TILE, arithmetic
from ...layer import error_budget, reference
from ...layer.formats import WEIGHT_FORMATS, WeightFormat
from .case import SHORT, Case, Mismatch, case_of, equal, within_budget
from .inputs import PAIRS, activations, generator, stored, with_every_pair
from .products import BF16, EVEN_INPUTS, FP16, FP32, RAGGED_INPUTS, may_be_quick

EPS = 1e-6
DTYPES = (FP32, BF16, FP16)
# (B, T, K) of norms, and K of rows that are quantized: one value, less than a block, ragged, several registers a
# thread, and more than a program holds.
NORM_SHAPES = ((2, 5, 64), (3, 4, 200), (1, 3, 1152), (2, 2, 3072))
WIDTHS = (1, 64, 200, 1152, 8192, 8200, 20000)


def quantize(columns: int, dtype: torch.dtype, static: bool, strided: bool = False):
    """Codes and scales bit for bit: rows of zeros, of NaN, infinite, tiny, and of ties."""
    x = activations(columns, 9, dtype).T if strided else activations(9, columns, dtype)
    x[4, -1], x[5, 0] = float("nan"), float("inf")
    x[6] *= 1e-6
    x[7] *= 2.0**-110 if dtype != FP16 else 1
    x[8] = torch.linspace(-2, 2, columns).to(dtype)
    amax = torch.tensor([3.0]) if static else None
    found, expected = activation.quantize_activation(x, amax), reference.quantize_activation(x, amax)
    return equal(found[0], expected[0], "codes") + ", " + equal(found[1], expected[1], "scales")


def _codes_within_budget(found, exact, error, amax):
    share = error_budget.worst_share_of_codes(*found, exact, error, reference.SMALLEST_AMAX, amax)
    if not share <= 1:
        raise Mismatch(f"codes and scales: {share:.3g} times the error that is allowed")
    return f"codes {share:.2f} of the budget"


def gelu(columns: int, dtype: torch.dtype, static: bool, approximate: str, first: int = 0):
    """Quantization behind GELU, with ``first`` columns in front of it."""
    x = activations(7, columns, dtype)
    amax = torch.tensor([2.5]) if static else None
    exact = F.gelu(x.double(), approximate=approximate)
    before = None
    if first:
        wide = torch.randn(7, first + 24, generator=generator(2)).to(dtype)
        before = wide[:, 8 : first + 8]  # rows of something wider
        exact = torch.cat([before.double(), exact], 1)
    found = activation.gelu_quantize(x, amax, approximate, before)
    return _codes_within_budget(found, exact, error_budget.gelu_error(x), amax)


def norm(shape: tuple[int, int, int], dtype: torch.dtype, static: bool, modulated: bool, affine: bool):
    """LayerNorm and modulation, as they are and quantized."""
    batch, tokens, columns = shape
    x = activations(batch * tokens, columns, dtype).unflatten(0, (batch, tokens))
    wide = torch.randn(batch, 6 * columns, generator=generator(1)).to(dtype)
    parts = [None, None, None, None]  # weight, bias, shift, scale
    if affine:
        parts[:2] = wide[0, columns : 2 * columns], wide[0, 2 * columns : 3 * columns]
    if modulated:
        parts[2:] = wide[:, 3 * columns : 4 * columns], wide[:, 4 * columns : 5 * columns]
    amax = torch.tensor([3.0]) if static else None
    weight, bias, shift, scale = (None if part is None else part.double() for part in parts)
    exact = F.layer_norm(x.double(), (columns,), weight, bias, EPS)
    exact = exact if scale is None else exact * (1 + scale.unsqueeze(1))
    exact = (exact if shift is None else exact + shift.unsqueeze(1)).flatten(0, 1)
    found = activation.norm_modulate_quantize(x, *parts, amax, EPS)
    said = _codes_within_budget(found, exact, error_budget.norm_error(exact), amax)
    y = activation.norm_modulate(x, *parts, EPS).flatten(0, 1)
    return said + ", " + within_budget(y, (exact, error_budget.norm_budget(exact, dtype)), SHORT[dtype])


def attention_inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, normed: bool, turns: bool):
    """Of one stream or of two, parts of something wider: (B, tokens before, tokens, heads, channels)."""
    batch, first, tokens, count, channels = shape
    wide = activations(batch * (first + tokens), 3 * count * channels, dtype).unflatten(0, (batch, -1))
    norms = [torch.randn(channels, generator=generator(number)).to(dtype) if normed else None for number in range(4)]
    angles = tuple(torch.randn(2, first + tokens, channels, generator=generator(5))) if turns else (None, None)
    more = (wide[:, :first], tuple(norms[2:])) if first else ()
    found = heads.attention_inputs(wide[:, first:], tuple(norms[:2]), *angles, count, EPS, *more)
    query, key, value = wide.unflatten(-1, (3, count, channels)).unbind(2)
    said = []
    for name, y, part, (behind, before) in (("q", found[0], query, norms[::2]), ("k", found[1], key, norms[1::2])):
        for stream, norm in ((slice(first), before), (slice(first, None), behind)):
            if y[:, stream].numel():
                here = (None if one is None else one[stream] for one in angles)
                oracle = error_budget.rotation_oracle(part[:, stream], norm, *here, EPS)
                said.append(within_budget(y[:, stream], oracle, name))
    return ", ".join([*said, *([equal(found[2], value.contiguous(), "v")] if first else [])])


def expand(fmt: WeightFormat, in_features: int, dtype: torch.dtype):
    """A stretch of the decoded weight, exactly: of two levels every multiplier and zero point that a group can have."""
    outputs = PAIRS if fmt.two_level else 22
    weight = with_every_pair(stored(fmt, 128 + outputs, in_features)[0], 128)
    scratch = torch.empty(outputs, in_features, dtype=dtype)
    expansion.expand(weight, 128, scratch)
    decoded = reference.decode(weight) if dtype == torch.int8 else reference.dequantize(weight).to(dtype)
    return equal(scratch, decoded[128:], "weight")


def grad_input(fmt: WeightFormat, shape: tuple[int, int, int], dtype: torch.dtype, arch: int):
    rows, out_features, in_features = shape
    weight, _ = stored(fmt, out_features, in_features)
    grad = activations(rows, out_features, dtype)
    found = gradient.grad_input(grad, weight)
    does = arithmetic(GRADIENT_TILE, grad.element_size())
    oracle = error_budget.product_oracle(grad, reference.dequantize(weight).T, None, dtype, does, arch)
    return within_budget(found, oracle, SHORT[dtype])


def _activation_cases() -> Iterator[Case]:
    for columns in WIDTHS:
        for dtype in DTYPES:
            for static in (False, True):
                label = f"quantize {SHORT[dtype]} K={columns}{' static' if static else ''}"
                quick = columns in (200, 8200) and dtype == BF16
                yield case_of("activation", label, quantize, columns, dtype, static, quick=quick)
    yield case_of("activation", "quantize bf16 strided K=200", quantize, 200, BF16, False, True)
    for columns in (1, 200, 1152, 20000):
        for dtype in DTYPES:
            for approximate in ("none", "tanh"):
                for static in (False, True):
                    label = f"gelu {approximate} {SHORT[dtype]} K={columns}{' static' if static else ''}"
                    chosen = columns == 200 or (columns == 20000 and approximate == "none")
                    quick = chosen and dtype == BF16 and not static
                    yield case_of("activation", label, gelu, columns, dtype, static, approximate, quick=quick)
    for columns, first in ((200, 72), (1152, 384), (17000, 200)):
        for dtype in DTYPES:
            for static in (False, True):
                label = f"gelu tanh {SHORT[dtype]} K={columns} behind {first}{' static' if static else ''}"
                quick = columns == 1152 and dtype == BF16 and not static
                yield case_of("activation", label, gelu, columns, dtype, static, "tanh", first, quick=quick)
    for shape in NORM_SHAPES:
        for dtype in DTYPES:
            for words in ("modulated", "static modulated", "affine", "plain"):
                label = f"norm {SHORT[dtype]} {shape} {words}"
                flags = [word in words for word in ("static", "modulated", "affine")]
                quick = shape[2] == 200 and dtype == BF16
                yield case_of("activation", label, norm, shape, dtype, *flags, quick=quick)


def _attention_cases() -> Iterator[Case]:
    for shape in ((2, 3, 5, 6, 16), (1, 0, 4, 24, 128), (1, 2, 3, 24, 128), (2, 1, 3, 38, 64), (1, 0, 3, 9, 256)):
        for dtype in DTYPES:
            for normed, turns in ((True, True), (False, True), (True, False)):
                label = f"{SHORT[dtype]} {shape}{'' if normed else ' plain'}{'' if turns else ' unturned'}"
                quick = dtype == BF16 and normed and shape[3] in (6, 24)
                yield case_of("attention inputs", label, attention_inputs, shape, dtype, normed, turns, quick=quick)


def cases(arch: int) -> Iterator[Case]:
    """Of all passes and formats."""
    yield from _activation_cases()
    yield from _attention_cases()
    for fmt in WEIGHT_FORMATS.values():
        quickly = may_be_quick(fmt, arch)
        for in_features in (128, 200, EVEN_INPUTS, 1136):
            for dtype in (*DTYPES, *((torch.int8,) if fmt.two_level else ())):
                label = f"{fmt.name} to {SHORT[dtype]} K={in_features}"
                quick = quickly and in_features == 200 and dtype in (BF16, torch.int8)
                yield case_of("expansion", label, expand, fmt, in_features, dtype, quick=quick)
        for shape in ((66, 72, RAGGED_INPUTS), (17, 64, EVEN_INPUTS), (3, 200, 136)):
            for dtype in DTYPES:
                label = f"{fmt.name} {SHORT[dtype]} {shape}"
                quick = quickly and shape[0] == 66 and dtype == BF16
                yield case_of("gradient", label, grad_input, fmt, shape, dtype, arch, quick=quick)
