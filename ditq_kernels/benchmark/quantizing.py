"""``ditq bench --quantizing``: how fast weights are quantized on this CPU, beside the libraries that a user would pick
instead, each through the interface that its documentation shows.

All take turns, round by round, on a fresh copy of the same layer; a figure is the median over rounds.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layer.linear import QuantLinear
from ..memory import return_freed
from .turns import Quartiles, no_matter, take_turns, version_of

ROUNDS = 7
# (N, K): the largest layers of DiT-XL/2 and of FLUX.1.
SHAPES = ((4608, 1152), (1152, 4608), (12288, 3072))
COMPENSATED_SHAPE = (1152, 4608)
Convert = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class Quantizer:
    """One library's way.

    Attributes:
        package: as pip knows it; None of this one.
        kind: "int8" or "int4": what is compared with what.
        convert: a layer to its quantized form; it may change the layer.
    """

    name: str
    package: str | None
    kind: str
    convert: Convert


def _ours(layer: nn.Linear, scheme: str) -> nn.Module:
    return QuantLinear.from_linear(layer, scheme)


def _torchao(layer: nn.Linear, kind: str) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    holder = nn.Sequential(layer)
    weights = IntxWeightOnlyConfig(torch.int4, PerGroup(128))
    quantize_(holder, Int8DynamicActivationInt8WeightConfig() if kind == "int8" else weights)
    return holder[0]


def _quanto(layer: nn.Linear, kind: str) -> nn.Module:
    from optimum import quanto

    holder = nn.Sequential(layer)
    quanto.quantize(holder, weights=getattr(quanto, f"q{kind}"))
    quanto.freeze(holder)
    return holder[0]


def _sdnq(layer: nn.Linear, kind: str) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    chosen = dict(weights_dtype="int8") if kind == "int8" else dict(weights_dtype="uint4", group_size=128)
    return sdnq_post_load_quant(nn.Sequential(layer), add_skip_keys=False, **chosen)[0]


QUANTIZERS = (
    Quantizer("ditq_kernels w8a8", None, "int8", partial(_ours, scheme="w8a8")),
    *(
        Quantizer(f"{package} int8", package, "int8", partial(convert, kind="int8"))
        for package, convert in (("torchao", _torchao), ("optimum-quanto", _quanto), ("sdnq", _sdnq))
    ),
    Quantizer("ditq_kernels w4a8_g128", None, "int4", partial(_ours, scheme="w4a8_g128")),
    *(
        Quantizer(f"{package} 4 bits", package, "int4", partial(convert, kind="int4"))
        for package, convert in (("torchao", _torchao), ("optimum-quanto", _quanto), ("sdnq", _sdnq))
    ),
)


@dataclass(frozen=True)
class Rate:
    """Million weights a second, of one library on one layer.

    Attributes:
        median, lower, upper: over rounds, with the quartiles.
        temporary_bytes: per weight, the most memory that is held on the way beyond the layer's and the result's; None
            where the system does not tell.
        reason: why there is nothing else.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    version: str | None
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    temporary_bytes: float | None = None
    reason: str | None = None


def _status(name: str) -> int | None:
    """Bytes of memory that the system says of this process; None where it does not."""
    try:
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        return None


def stored_bytes(module: nn.Module) -> int:
    """Of all that the module's parameters and buffers hold, inside tensors of other libraries too."""
    seen: dict[int, int] = {}
    left: list[Any] = [*module.parameters(), *module.buffers()]
    while left:
        one = left.pop()
        if type(one) in (torch.Tensor, nn.Parameter) or not hasattr(one, "__tensor_flatten__"):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:
            names, _ = one.__tensor_flatten__()
            left += [getattr(one, name) for name in names]
    return sum(seen.values())


def temporary_bytes(layer: nn.Linear, convert: Convert) -> int | None:
    """The most memory that ``convert`` holds on the way, beyond the layer and the result; None where nobody tells."""
    return_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _status("VmRSS")
    result = convert(layer)
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before - stored_bytes(result))


def _layer(shape: tuple[int, int]) -> nn.Linear:
    out_features, in_features = shape
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    return layer


def _rates(
    shape: tuple[int, int], quantizers: Sequence[Quantizer], rounds: int, advance: Callable[[], object]
) -> Iterator[Rate]:
    layer, weights = _layer(shape), shape[0] * shape[1]
    memory: dict[str, int | None] = {}

    def rate(one: Quantizer) -> float:
        mine = copy.deepcopy(layer)
        if one.name not in memory:  # after a first time, that loads what it needs
            one.convert(copy.deepcopy(layer))
            memory[one.name] = temporary_bytes(mine, one.convert)
            return 0.0
        started = time.perf_counter()
        one.convert(mine)
        return weights / (time.perf_counter() - started) / 1e6

    found, failed = take_turns({one.name: partial(rate, one) for one in quantizers}, rounds, advance)
    for one in quantizers:
        facts = (one.name, one.kind, shape, version_of(one.package))
        if one.name in failed:
            yield Rate(*facts, reason=failed[one.name])
            continue
        of = Quartiles.of(found[one.name])
        held = memory[one.name]
        yield Rate(*facts, of.median, of.lower, of.upper, None if held is None else held / weights)


def measure(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    quantizers: Sequence[Quantizer] = QUANTIZERS,
    rounds: int = ROUNDS,
    advance: Callable[[], object] = no_matter,
) -> Iterator[Rate]:
    """Rates on each shape; of what is not installed, the reason. ``advance`` is called before each turn."""
    installed = tuple(one for one in quantizers if version_of(one.package) is not None)
    for shape in shapes:
        for one in quantizers:
            if one not in installed:
                yield Rate(one.name, one.kind, shape, None, reason=f"{one.package} is not installed")
        yield from _rates(shape, installed, rounds, advance)


def compensated_seconds(shape: tuple[int, int] = COMPENSATED_SHAPE, rounds: int = 3) -> list[float]:
    """Seconds that error-compensated rounding of one layer to w4a8_g128 takes, round by round."""
    layer = _layer(shape)
    x = torch.randn(2 * shape[1], shape[1], generator=torch.Generator().manual_seed(1))
    moment = x.T @ x
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        QuantLinear.from_linear(layer, "w4a8_g128", input_moment=moment)
        found.append(time.perf_counter() - started)
    return found


def fastest_peer(rates: Sequence[Rate], rate: Rate) -> Rate | None:
    """Of the other libraries, the one with the highest median for the same kind and shape."""
    others = [
        one
        for one in rates
        if (one.kind, one.shape) == (rate.kind, rate.shape) and one.median and not one.name.startswith("ditq_kernels")
    ]
    return max(others, key=lambda one: one.median, default=None)


def table(rates: Sequence[Rate]) -> str:
    """As Markdown: ours with its ratio to the fastest other library."""
    lines = [
        "| N x K | library | version | million weights/s (quartiles) | to the fastest other | temporary bytes/weight |",
        "|---|---|---|---|---|---|",
    ]
    for rate in rates:
        peer = fastest_peer(rates, rate) if rate.name.startswith("ditq_kernels") else None
        speed = rate.reason or f"{rate.median:.0f} ({rate.lower:.0f} to {rate.upper:.0f})"
        ratio = f"{rate.median / peer.median:.2f}" if peer is not None and rate.median else ""
        held = "" if rate.temporary_bytes is None else f"{rate.temporary_bytes:.1f}"
        shape = " x ".join(map(str, rate.shape))
        lines.append(f"| {shape} | {rate.name} | {rate.version or ''} | {speed} | {ratio} | {held} |")
    return "\n".join(lines)


def record(rates: Sequence[Rate], compensated: Sequence[float], about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON."""
    return dict(
        **about,
        rates=[asdict(rate) for rate in rates],
        compensated=dict(shape=COMPENSATED_SHAPE, seconds=list(compensated)),
    )
