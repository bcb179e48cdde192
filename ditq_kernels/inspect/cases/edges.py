"""Products at their edges: the largest sums, rows that are not finite, rows that begin at odd places, stretches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels import activation, dispatch, expansion
from ...kernels.config import CONFIGS, Config
from ...layer import error_budget, reference
from ...layer.formats import WEIGHT_FORMATS, WeightFormat
from .case import Case, Mismatch, case_of, equal, within_budget
from .inputs import activations, generator, stored
from .products import BF16, FP32, product_a8, product_a16, selectable

ROWS, OUTPUTS, INPUTS = 20, 72, 256
MANY_INPUTS = 1136
FORMATS = ("w8", "w8_g64", "w4", "w4_g128")


def extremes(fmt: WeightFormat, config: Config):
    """Codes of the largest magnitude everywhere: the largest sums there are."""
    weight, _ = stored(fmt, OUTPUTS, MANY_INPUTS)
    signs = 2 * torch.randint(0, 2, (ROWS, MANY_INPUTS), generator=generator(3)) - 1
    qx = (127 * signs).to(torch.int8)
    qx[0] = torch.where(reference.decode(weight)[5] < 0, -127, 127).to(torch.int8)
    y = dispatch.linear_a8(qx, torch.ones(ROWS), weight, None, FP32, config)
    return equal(y, reference.linear_a8(qx, torch.ones(ROWS), weight, None, FP32), "sums")


def broken_row(fmt: WeightFormat, config: Config):
    """A row that is not finite is NaN, and stays alone."""
    weight, bias = stored(fmt, OUTPUTS, INPUTS)
    x = activations(ROWS, INPUTS, FP32)
    x[2, 5] = float("inf")
    qx, sx = activation.quantize_activation(x)
    y = dispatch.linear_a8(qx, sx, weight, bias, BF16, config)
    if not y[2].isnan().all():
        raise Mismatch("the broken row is not NaN")
    others = torch.arange(ROWS) != 2
    expected = reference.linear_a8(qx, sx, weight, bias, BF16)
    return equal(y[others], expected[others], "other rows")


def anywhere_a8(fmt: WeightFormat, config: Config):
    """Rows that begin at odd places."""
    weight, _ = stored(fmt, OUTPUTS, INPUTS)
    wide = torch.randint(-127, 128, (ROWS, INPUTS + 16), dtype=torch.int8, generator=generator(4))
    for shift in (1, 3):
        x = wide[:, shift : shift + INPUTS]
        y = dispatch.linear_a8(x, torch.ones(ROWS), weight, None, FP32, config)
        equal(y, reference.linear_a8(x.contiguous(), torch.ones(ROWS), weight, None, FP32), f"shifted by {shift}")
    return "equal"


def anywhere_a16(fmt: WeightFormat, config: Config):
    """Rows that begin at odd places, and columns that lie apart."""
    weight, bias = stored(fmt, OUTPUTS, INPUTS)
    wide = activations(min(ROWS, config.block_m or ROWS), INPUTS + 16, BF16)
    for shift in (1, 3):
        x = wide[:, shift : shift + INPUTS]
        straight = dispatch.linear_a16(x.contiguous(), weight, bias, False, config)
        for laid in (x, x.T.contiguous().T):
            y = dispatch.linear_a16(laid, weight, bias, False, config)
            if config.route == "small":  # its sums take another order where loads are narrower
                exact = straight.double()
                within_budget(y, (exact, 2 * error_budget.rounding(exact, BF16)), f"shifted by {shift}")
            else:
                equal(y, straight, f"shifted by {shift}")
    return "equal"


def in_stretches(kind: str, fmt: WeightFormat, config: Config, arch: int):
    """A weight that takes several turns in the scratch, whose products write slices of the output."""
    before, expansion.SCRATCH_BYTES = expansion.SCRATCH_BYTES, 150 * INPUTS * 2
    try:
        if kind == "i8":
            return product_a8(fmt, (ROWS, 300, INPUTS), config, BF16, True)
        return product_a16(fmt, (ROWS, 300, INPUTS), config, BF16, True, arch)
    finally:
        expansion.SCRATCH_BYTES = before


def cases(arch: int) -> Iterator[Case]:
    """With the last tile of each route, and the last that descriptors copy."""
    for name in FORMATS:
        fmt = WEIGHT_FORMATS[name]
        for size, kind in ((1, "i8"), (2, "bf16")):
            for route in ("in_loop", "int8", "expanded"):
                valid = [
                    c for c in selectable(fmt, size, 4 if size == 1 else 2, arch) if c.route == route and c.block_m
                ]
                chosen = valid[-1:] + [config for config in valid if config.descriptors][-1:]
                for config in dict.fromkeys(chosen):
                    label = f"{name} x {kind} {config}"
                    if kind == "i8" and not fmt.promoted:
                        yield case_of("edge", f"extremes {label}", extremes, fmt, config)
                    if kind == "i8":
                        yield case_of("edge", f"broken row {label}", broken_row, fmt, config)
                        yield case_of("edge", f"anywhere {label}", anywhere_a8, fmt, config)
                    else:
                        yield case_of("edge", f"anywhere {label}", anywhere_a16, fmt, config)
                    if route == "expanded":
                        yield case_of("edge", f"stretches {label}", in_stretches, kind, fmt, config, arch)
        for config in CONFIGS["small"][::2]:
            yield case_of("edge", f"anywhere {name} x bf16 {config}", anywhere_a16, fmt, config)
