"""Products: every form that the choice of a configuration may return, on ragged and on even shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import torch

from ...kernels import dispatch
from ...kernels.config import (
    CONFIGS,
    EXTENSION_ROUTES,
    OVERLAPPED_ROUTES,
    ROW_CLASSES,
    Config,
    Problem,
    adds_residuals,
    arithmetic,
    is_valid,
)
from ...layer import error_budget, reference
from ...layer.formats import WEIGHT_FORMATS, WeightFormat
from ...layer.gated_residual import GatedResidual
from .case import SHORT, Case, case_of, equal, within_budget
from .inputs import activations, stored, with_powers_of_two

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVEN_INPUTS, RAGGED_INPUTS = 256, 720  # fewer blocks than a pipeline is deep, and more; a ragged last one
IDENTITY_INPUTS = 320
MULTIPROCESSORS = 2  # few, so that persistent programs loop
# What stands for one output dtype: with a bias, and without.
A8_OUTPUTS = ((BF16, True), (FP16, False), (FP32, True), (torch.int32, False))
A16_INPUTS = ((BF16, True), (FP16, False), (FP32, True))
# The tile of a dense product does not know the format that its operand was expanded from: every format meets the first
# tile, and one of each kind all of them.
EXPANDED_WITH_EVERY_TILE = ("w8_g32", "w4_g128")
# Of the quick cases sm_90 has every format; elsewhere four stand for all: of both widths, without groups and with them.
QUICK_ARCHITECTURE, QUICK_FORMATS = 90, ("w8", "w4", *EXPANDED_WITH_EVERY_TILE)


def may_be_quick(fmt: WeightFormat, arch: int) -> bool:
    """Whether cases of ``fmt`` on ``arch`` may be among the quick ones."""
    return arch == QUICK_ARCHITECTURE or fmt.name in QUICK_FORMATS


@functools.lru_cache(maxsize=4096)
def selectable(fmt: WeightFormat, activation_bytes: int, output_bytes: int, arch: int) -> tuple[Config, ...]:
    """Every configuration but the extension's that is valid for some rows and inputs, in the table's order."""
    problems = [
        Problem(rows, EVEN_INPUTS, inputs, activation_bytes, fmt, arch, MULTIPROCESSORS, output_bytes)
        for rows, inputs in itertools.product(ROW_CLASSES, (EVEN_INPUTS, RAGGED_INPUTS))
    ]
    return tuple(
        config
        for route in CONFIGS.values()
        for config in route
        if config.route not in EXTENSION_ROUTES and any(is_valid(config, problem) for problem in problems)
    )


def ragged_shape(config: Config, number: int) -> tuple[int, int, int]:
    """(M, N, K): beyond one tile on one side, in turn by ``number``, of persistent programs on both; no side even."""
    if config.route == "small":
        return config.block_m, 5 * config.block_n + 1, RAGGED_INPUTS
    height, width = config.block_m or 17, config.block_n or 64
    if config.descriptors:
        many = config.route in OVERLAPPED_ROUTES  # so that consumers have several turns
        return height + 2, (width << many) + 24, RAGGED_INPUTS
    return (height + 2, width - 8, RAGGED_INPUTS) if number % 2 else (height - 3, width + 24, RAGGED_INPUTS)


def even_shape(config: Config) -> tuple[int, int, int]:
    """(M, N, K): one tile, whose last rows are not there."""
    if config.route == "small":
        return max(1, config.block_m - 1), 2 * config.block_n, EVEN_INPUTS
    return max(1, (config.block_m or 17) - 3), config.block_n or 64, EVEN_INPUTS


def product_a8(fmt: WeightFormat, shape: tuple[int, int, int], config: Config | None, out: torch.dtype, biased: bool):
    """Codes of int8 activations: exact sums, and roundings in a fixed order behind them."""
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features)
    bias = bias.to(out) if biased else None
    qx, sx = reference.quantize_activation(activations(rows, in_features, FP32))
    y = dispatch.linear_a8(qx, sx, weight, bias, out, config)
    expected = reference.linear_a8(qx, sx, weight, bias, out)
    return equal(y, expected, SHORT[out])


def added_a8(fmt: WeightFormat, shape: tuple[int, int, int], config: Config, out: torch.dtype):
    """:func:`product_a8`, added to rows of something wider, times a gate that is part of a modulation."""
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features)
    qx, sx = reference.quantize_activation(activations(rows, in_features, FP32))
    samples = next(number for number in (3, 2, 1) if rows % number == 0)
    residual = activations(rows, out_features + 16, out)[:, 8:-8]
    gate = activations(samples, 3 * out_features, out)[:, out_features : 2 * out_features]
    operands = qx, sx, weight, bias.to(out), out
    added = GatedResidual(residual, gate)
    found, expected = dispatch.linear_a8(*operands, config, added), reference.linear_a8(*operands, added=added)
    return equal(found, expected, SHORT[out])


def product_a16(
    fmt: WeightFormat,
    shape: tuple[int, int, int],
    config: Config | None,
    dtype: torch.dtype,
    biased: bool,
    arch: int,
    silu: bool = False,
):
    """Activations in their own dtype: within the error budget of what the route does to numbers."""
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features)
    bias = bias.to(dtype) if biased else None
    x = activations(rows, in_features, dtype)
    y = dispatch.linear_a16(x, weight, bias, silu, config)
    config = config or dispatch.chosen(x, out_features, fmt, dtype)
    does = arithmetic(config, x.element_size())
    entering, error = error_budget.silu_operand(x) if silu else (x, None)
    w = reference.dequantize(weight)
    return within_budget(y, error_budget.product_oracle(entering, w, bias, dtype, does, arch, error), SHORT[dtype])


def identity(fmt: WeightFormat, config: Config, kind: torch.dtype):
    """One-hot rows: the product is the weight itself."""
    weight = with_powers_of_two(stored(fmt, 72, IDENTITY_INPUTS)[0])
    expected = reference.dequantize(weight).T
    eye = torch.eye(IDENTITY_INPUTS, dtype=kind)
    if kind == torch.int8:
        return equal(dispatch.linear_a8(eye, torch.ones(len(eye)), weight, None, FP32, config), expected, "weight")
    return equal(dispatch.linear_a16(eye, weight, None, False, config).float(), expected, "weight")


def _smallest(configs: Iterable[Config]) -> set[Config]:
    """Of each route the smallest tile that pointers copy, the one that descriptors do, and none where there is none."""
    by_area = sorted(configs, key=lambda config: config.block_m * config.block_n)
    kinds: dict[tuple[str, bool, bool], Config] = {}
    for config in by_area:
        kinds.setdefault((config.route, config.descriptors, config.block_m > 0), config)
    return set(kinds.values())


def _of_format(fmt: WeightFormat, arch: int) -> Iterator[Case]:
    for activation_bytes in (1, 2, 4):
        seen = set()
        configs = selectable(fmt, activation_bytes, max(2, activation_bytes), arch)
        # fp32 takes the routes of 16-bit activations: two formats stand for all.
        quick = may_be_quick(fmt, arch) and (activation_bytes < 4 or fmt.name in EXPANDED_WITH_EVERY_TILE)
        quickly = _smallest(configs) if quick else set()
        for number, config in enumerate(configs):
            first = config.route not in seen
            seen.add(config.route)
            if (
                not config.route.startswith("expanded")
                or not config.block_m
                or first
                or fmt.name in EXPANDED_WITH_EVERY_TILE
            ):
                yield from _of_config(fmt, activation_bytes, config, number, config in quickly, arch)


def _of_config(
    fmt: WeightFormat, activation_bytes: int, config: Config, number: int, quick: bool, arch: int
) -> Iterator[Case]:
    """Every dtype on an even shape, one of them in turn on a ragged one, which may be among the quick cases."""
    if activation_bytes == 1:
        kinds = [kind for kind in A8_OUTPUTS if kind[0] != torch.int32 or not fmt.promoted]
    else:
        kinds = [kind for kind in A16_INPUTS if kind[0].itemsize == activation_bytes]
    kinds = [kind for kind in kinds if config in selectable(fmt, activation_bytes, kind[0].itemsize, arch)]
    ragged = kinds[number % len(kinds)]
    for shape, (dtype, biased) in [(even_shape(config), kind) for kind in kinds] + [
        (ragged_shape(config, number), ragged)
    ]:
        chosen = quick and shape[2] == RAGGED_INPUTS
        if activation_bytes == 1:
            name = f"{fmt.name} x i8 to {SHORT[dtype]} {config} {shape}"
            yield case_of(config.route, name, product_a8, fmt, shape, config, dtype, biased, quick=chosen)
        else:
            name, arguments = f"{fmt.name} x {SHORT[dtype]} {config} {shape}", (fmt, shape, config, dtype, biased, arch)
            yield case_of(config.route, name, product_a16, *arguments, quick=chosen)
    if activation_bytes == 1 and adds_residuals(config):
        for shape, out in ((ragged_shape(config, number), BF16), (even_shape(config), FP16)):
            name = f"{fmt.name} x i8 to {SHORT[out]} {config} {shape} added"
            yield case_of(config.route, name, added_a8, fmt, shape, config, out, quick=quick and out == BF16)
    entering = {1: torch.int8, 2: BF16, 4: FP32}[activation_bytes]
    label = f"{fmt.name} x {SHORT[entering]}"
    if activation_bytes > 1 and config.route in dispatch.LOADS_WITH_SILU:
        arguments = fmt, even_shape(config), config, entering, True, arch, True
        yield case_of(config.route, f"{label} silu {config}", product_a16, *arguments)
    if config.route == "in_loop":
        yield case_of("in_loop", f"{label} identity {config}", identity, fmt, config, entering)
    if config.route == "small":
        arguments = fmt, (config.block_m, 13, 130), config, entering, True, arch
        yield case_of("small", f"{label} {config} K=130", product_a16, *arguments)


def _chosen(fmt: WeightFormat, arch: int) -> Iterator[Case]:
    """By the configuration that the heuristic chooses."""
    for shape in ((130, 200, RAGGED_INPUTS), (17, 64, EVEN_INPUTS), (1, 200, 130), (5, 2, 33), (1, 1, 1)):
        if (fmt.group or 0) > shape[2]:
            continue  # no such weight
        for out, biased in A8_OUTPUTS[:3]:
            name = f"{fmt.name} x i8 to {SHORT[out]} {shape}"
            yield case_of("chosen", name, product_a8, fmt, shape, None, out, biased)
        for dtype, biased in A16_INPUTS:
            name = f"{fmt.name} x {SHORT[dtype]} {shape}"
            yield case_of("chosen", name, product_a16, fmt, shape, None, dtype, biased, arch)


def cases(arch: int) -> Iterator[Case]:
    """Of all routes and formats."""
    for fmt in WEIGHT_FORMATS.values():
        yield from _of_format(fmt, arch)
        yield from _chosen(fmt, arch)
