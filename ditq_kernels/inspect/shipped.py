"""Every compiled form in which the kernels may run on an architecture, as far as machine code can differ: what
``ditq inspect`` and its tests walk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..kernels import (
    activation,
    dense_product,
    early_start,
    expansion,
    gradient,
    heads,
    in_loop_product,
    overlapped_product,
    small_product,
)
from ..kernels.config import CONFIGS, Config, Problem, adds_residuals, is_valid
from ..layer.formats import WEIGHT_FORMATS, WeightFormat
from .compilation import Variant

EVEN_WIDTH, RAGGED_WIDTH = 3072, 1136
MANY_ROWS = 4096
MULTIPROCESSORS = 132  # any number: it decides which configuration is chosen, not which are valid
ACTIVATION_TYPES = {1: "i8", 2: "bf16"}  # what matrix products take; bf16 stands for fp16 too
WIDEST_TYPE = "fp32"  # other kernels take it as well
# int8 products write accumulators and fp32 as well.
OUTPUT_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32}
ELEMENT_BYTES = {kind: size for size, kind in ACTIVATION_TYPES.items()} | {WIDEST_TYPE: 4}
# Of 4-bit weights with int8 activations and 128 x 128 tiles: decoding must hide behind the matrix units. Groups of 32
# have four bytes to unpack in each block of 128 inputs, where groups of 128 have one.
ISSUE_BUDGETS = {"w4": 0.7, "w4_g128": 0.7, "w4_g64": 0.7, "w4_g32": 0.9}
# (K, GELU, columns before it) of the quantizer, and K of the norm: one and several rows of registers a thread, and more
# than a block.
QUANTIZED_ROWS = (
    *((1152, "", 0), (3072, "", 0), (20000, "", 0), (4608, "tanh", 0), (12288, "none", 0)),
    *((12288, "tanh", 3072), (20000, "tanh", 3072)),
)
NORM_WIDTHS = (1152, 3072)


def _weight_types(fmt: WeightFormat) -> dict[str, str | None]:
    return dict(qweight="*u8" if fmt.bits == 4 else "*i8", scale="*fp32", group_code="*u8" if fmt.two_level else None)


def _residual_types(adds: bool) -> dict[str, str | None]:
    return dict.fromkeys(("residual", "gate"), "*bf16" if adds else None)


def _problem(
    fmt: WeightFormat, activation_bytes: int, arch: int, rows: int = MANY_ROWS, output_bytes: int = 2
) -> Problem:
    return Problem(rows, EVEN_WIDTH, EVEN_WIDTH, activation_bytes, fmt, arch, MULTIPROCESSORS, output_bytes)


def _to(output: str) -> str:
    return "" if output == "bf16" else f" to {output}"


def _in_loop(arch: int) -> Iterator[Variant]:
    for activation_bytes, kind in ACTIVATION_TYPES.items():
        for fmt in WEIGHT_FORMATS.values():
            yield from _in_loop_of(fmt, activation_bytes, kind, arch)


def _in_loop_of(fmt: WeightFormat, activation_bytes: int, kind: str, arch: int) -> Iterator[Variant]:
    valid = [c for c in CONFIGS["in_loop"] if is_valid(c, _problem(fmt, activation_bytes, arch))]
    # Masks along K, SiLU and the accumulators as output change loads and stores and not the tiles: one form of each.
    plain = False, False  # SiLU, and a residual
    forms = [(config, EVEN_WIDTH, plain, "bf16") for config in valid] + [(valid[0], RAGGED_WIDTH, plain, "bf16")]
    forms += [(valid[-1], EVEN_WIDTH, (True, False), "bf16")] if kind != "i8" else []
    forms += [(valid[0], EVEN_WIDTH, plain, "i32")] if kind == "i8" and not fmt.promoted else []
    forms += [(config, EVEN_WIDTH, (False, True), "bf16") for config in filter(adds_residuals, valid) if kind == "i8"]
    for config, width, (silu, adds), output in forms:
        even, integer = width == EVEN_WIDTH, kind == "i8"
        constants, options = in_loop_product.specialise(config, fmt, OUTPUT_TYPES[output], even, silu, arch, integer)
        bias = None if output == "i32" else "*bf16"
        types = dict(x=f"*{kind}", sx="*fp32" if kind == "i8" else None, bias=bias, y=f"*{output}")
        types |= _weight_types(fmt) | _residual_types(adds)
        large = config.block_m * config.block_n >= 128 * 128 and width == EVEN_WIDTH and output == "bf16"
        yield Variant(
            f"{fmt.name} x {kind} {config} K={width}{' silu' if silu else ''}{_to(output)}{' added' if adds else ''}",
            in_loop_product.in_loop_product_kernel,
            types,
            constants,
            options,
            matrix="int8" if kind == "i8" else "float",
            decodes=fmt.bits == 4 or kind != "i8",
            issue_budget=ISSUE_BUDGETS.get(fmt.name) if large and kind == "i8" else None,
        )


def _small(fmt: WeightFormat) -> Iterator[Variant]:
    """All configurations; of groups shorter than 128, which differ in a divisor, the one with the most registers."""
    shorter = fmt.group is not None and fmt.group < 128
    for config in CONFIGS["small"][-1:] if shorter else CONFIGS["small"]:
        last = config is CONFIGS["small"][-1]
        for kind, silu in (("bf16", False), *((("bf16", True), (WIDEST_TYPE, False)) if last else ())):
            constants, options = small_product.specialise(
                config, fmt, silu, torch.float32 if kind == WIDEST_TYPE else torch.bfloat16
            )
            types = dict(x=f"*{kind}", bias=f"*{kind}", y=f"*{kind}", **_weight_types(fmt))
            name = f"{fmt.name} x {kind} {config}{' silu' if silu else ''}"
            yield Variant(name, small_product.small_product_kernel, types, constants, options)


def _dense(arch: int) -> Iterator[Variant]:
    """The int8 product, of weights as stored and of expanded ones, and the 16-bit product of expanded ones."""
    problems = {"int8": _problem(WEIGHT_FORMATS["w8"], 1, arch), "expanded": _problem(WEIGHT_FORMATS["w8"], 2, arch)}
    for route, problem in problems.items():
        kind = ACTIVATION_TYPES[problem.activation_bytes]
        valid = [config for config in CONFIGS[route] if config.block_m and is_valid(config, problem)]
        pointers = next(config for config in valid if not config.descriptors)
        forms = [(config, EVEN_WIDTH, "bf16", False) for config in valid] + [(pointers, RAGGED_WIDTH, "bf16", False)]
        if kind == "i8":
            # What is stored takes shared memory too: every tile that may write fp32 does so, one writes accumulators.
            wide = _problem(WEIGHT_FORMATS["w8"], 1, arch, output_bytes=4)
            forms += [(config, EVEN_WIDTH, "fp32", False) for config in valid if is_valid(config, wide)]
            forms.append((pointers, EVEN_WIDTH, "i32", False))
            forms += [(config, EVEN_WIDTH, "bf16", True) for config in filter(adds_residuals, valid)]
        for config, width, output, adds in forms:
            constants, options = dense_product.specialise(config, OUTPUT_TYPES[output], width == EVEN_WIDTH)
            yield Variant(
                f"dense {kind} {config} K={width}{_to(output)}{' added' if adds else ''}",
                dense_product.dense_product_kernel,
                _dense_types(config, kind, output) | _residual_types(adds),
                constants,
                options,
                matrix="int8" if kind == "i8" else "float",
            )


def _overlapped(arch: int) -> Iterator[Variant]:
    """The int8 product whose matrix instructions overlap: every tile, with every output that is staged otherwise."""
    for output, adds in (("bf16", False), ("bf16", True), ("fp32", False), ("i32", False)):
        problem = _problem(WEIGHT_FORMATS["w8"], 1, arch, output_bytes=OUTPUT_TYPES[output].itemsize)
        for config in CONFIGS["overlapped"]:
            if not is_valid(config, problem):
                continue
            constants, options = overlapped_product.specialise(config, OUTPUT_TYPES[output])
            types = _dense_types(config, "i8", output) | _residual_types(adds)
            for name in ("x", "w"):
                types[name] = types[name].replace("]>", f"],{overlapped_product.layout()!r}>")
            yield Variant(
                f"{config}{_to(output)}{' added' if adds else ''}",
                overlapped_product.overlapped_product_kernel,
                types,
                constants,
                options,
                matrix="int8",
                in_flight=True,
            )


def _dense_types(config: Config, kind: str, output: str) -> dict[str, str | None]:
    scaled = "*fp32" if kind == "i8" else None
    operands = {"x": config.block_m, "w": config.block_n}
    types = {
        name: f"tensordesc<{kind}[{rows}, {config.block_k}]>" if config.descriptors else f"*{kind}"
        for name, rows in operands.items()
    }
    return dict(**types, sx=scaled, scale=scaled, bias=None if output == "i32" else "*bf16", y=f"*{output}")


def _expansion(fmt: WeightFormat) -> Iterator[Variant]:
    for kind in (*ACTIVATION_TYPES.values(), WIDEST_TYPE):
        if kind == "i8" and not fmt.two_level:
            continue  # int8 activations meet 8-bit weights as they are stored
        constants, options = expansion.specialise(fmt, True, ELEMENT_BYTES[kind])
        types = dict(expanded=f"*{kind}", **_weight_types(fmt))
        yield Variant(f"{fmt.name} expansion to {kind}", expansion.expansion_kernel, types, constants, options)


def _gradient(fmt: WeightFormat) -> Variant:
    constants, options = gradient.specialise(fmt, True)
    types = dict(grad="*bf16", grad_x="*bf16", **_weight_types(fmt))
    return Variant(f"{fmt.name} gradient", gradient.grad_input_kernel, types, constants, options, matrix="float")


def _activation(arch: int) -> Iterator[Variant]:
    for width, gelu, first in QUANTIZED_ROWS:
        for amax in (None, "*fp32"):
            constants, options = activation.specialise(width, arch, gelu, first)
            types = dict(x="*bf16", amax=amax, codes="*i8", scales="*fp32", before="*bf16" if first else None)
            name = f"{f'gelu {gelu} ' if gelu else ''}quantize {'static' if amax else 'per token'} K={width}"
            name += f" behind {first}" if first else ""
            yield Variant(name, activation.quantize_activation_kernel, types, constants, options)
    for width in NORM_WIDTHS:
        for kind in ("i8", "bf16"):
            constants, options = activation.specialise(width, arch)
            scales = "*fp32" if kind == "i8" else None
            types = dict(x="*bf16", weight=None, bias=None, shift="*bf16", scale="*bf16", amax=None, eps="fp32")
            types |= dict(y=f"*{kind}", y_scales=scales)
            name = f"norm modulate to {kind} K={width}"
            yield Variant(name, activation.norm_modulate_kernel, types, constants, options)


def _attention_inputs(arch: int) -> Iterator[Variant]:
    """FLUX's heads, of one stream and of two; and those of other models, and without norms."""
    for count, channels, values, kind, normed, turns in (
        *(
            (24, 128, False, "bf16", True, True),
            (24, 128, True, "bf16", True, True),
            (24, 128, True, "fp32", True, True),
        ),
        *((38, 64, True, "bf16", True, False), (9, 256, False, "bf16", False, True)),
    ):
        constants, options = heads.specialise(count, channels, values, arch)
        norms = dict.fromkeys(("query_norm", "key_norm"), f"*{kind}" if normed else None)
        angles = dict.fromkeys(("cos", "sin"), "*fp32" if turns else None)
        types = dict(x=f"*{kind}", y=f"*{kind}", eps="fp32", **norms, **angles)
        name = f"attention inputs {kind} {count} x {channels}{' values' if values else ''}{'' if normed else ' plain'}"
        yield Variant(name, heads.attention_inputs_kernel, types, constants, options)


def variants(arch: int) -> Iterator[Variant]:
    """The compiled forms for ``arch`` (10 * major + minor), whatever process enumerates them."""
    for variant in _variants(arch):
        if "COMPILED" in variant.constants:
            variant = dataclasses.replace(variant, constants={**variant.constants, "COMPILED": True})
        if "EARLY" in variant.constants:
            early = arch >= early_start.FIRST_CAPABILITY
            options = variant.options | early_start.launch_options(early)
            variant = dataclasses.replace(variant, constants={**variant.constants, "EARLY": early}, options=options)
        yield variant


def _variants(arch: int) -> Iterator[Variant]:
    yield from _activation(arch)
    yield from _attention_inputs(arch)
    yield from _dense(arch)
    yield from _overlapped(arch)
    yield from _in_loop(arch)
    for fmt in WEIGHT_FORMATS.values():
        yield from _small(fmt)
        yield from _expansion(fmt)
        yield _gradient(fmt)
