"""``ditq bench --steps``: how long whole steps of published models take, quantized and not, eager, compiled and as CUDA
graphs, beside the libraries that a user would pick instead.

Weights and inputs are random: no time depends on them. All that stand side by side take turns, round by round; a figure
is the median over rounds. Blocks are compiled, each kind once, as diffusers' ``compile_repeated_blocks`` does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.cuda_graphs import WARM_UP, captured
from ..published import MODELS, Model
from .libraries import RECOMPILE_LIMIT, Contender, ours, sdnq_int8, torchao_int8, unchanged
from .quantizing import stored_bytes
from .turns import Quartiles, no_matter, said_by, take_turns, version_of

ROUNDS = 7
BASELINE = "PyTorch bf16"
EAGER, COMPILED = "eager", "compiled"
GRAPH = ", CUDA graph"
OURS = ("w8a8", "w4a8_g128", "w4a16_g128")


def contenders(schemes: Sequence[str] | None = None) -> tuple[Contender, ...]:
    """The baseline, ours in ``schemes`` (default: :data:`OURS`), fused, and other libraries."""
    return (
        Contender(BASELINE, "torch", unchanged),
        *(Contender(f"ditq_kernels {scheme}", None, partial(ours, scheme=scheme)) for scheme in schemes or OURS),
        Contender("torchao int8", "torchao", torchao_int8),
        Contender("sdnq int8", "sdnq", sdnq_int8),
    )


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step, of one contender.

    Attributes:
        model: a key of :data:`ditq_kernels.published.MODELS`.
        way: EAGER or COMPILED, as a CUDA graph or not.
        median, lower, upper: over rounds, with the quartiles; of a step of several calls, of all.
        error: of the output, relative to the baseline's.
        nbytes: of all that the model keeps.
        reason: why there is nothing else.
    """

    model: str
    way: str
    name: str
    version: str | None
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    error: float | None = None
    nbytes: int | None = None
    reason: str | None = None


def _filled(value: Any, device: torch.device) -> Any:
    """``value`` with random contents where it is a tensor on meta: of integers, steps and classes."""
    if isinstance(value, dict):
        return {key: _filled(one, device) for key, one in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype.is_floating_point:
        return torch.randn(value.shape, dtype=value.dtype, device=device)
    return torch.randint(0, 999, value.shape, dtype=value.dtype, device=device)


def _built(model: Model, blocks: int | None, device: torch.device) -> nn.Module:
    """``model`` with random weights."""
    made = model.build(blocks).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for one in (*made.parameters(), *made.buffers()):
        if one.dtype.is_floating_point:
            one.data.normal_(std=1 / max(one.shape[-1], 1) ** 0.5 if one.ndim else 1.0, generator=generator)
        else:
            one.data.zero_()
    return made


def _compile_blocks(model: nn.Module, lists: Sequence[str]) -> None:
    for block in (block for name in lists for block in getattr(model, name)):
        block.compile(fullgraph=True)


def _replayed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``call`` as a CUDA graph, whose memory lives as long as it does."""
    replay, kept = captured(call, device)
    return lambda: (replay(), kept)


def _milliseconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    finished = torch.cuda.synchronize if device.type == "cuda" else no_matter
    finished()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    finished()
    return 1000 * (time.perf_counter() - started)


def _timings(
    name: str,
    model: Model,
    wanted: Sequence[Contender],
    device: torch.device,
    blocks: int | None,
    rounds: int,
    compiled: bool,
    advance: Callable[[], object],
) -> Iterator[Timing]:
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = _filled(model.inputs(), device)
    way = COMPILED if compiled else EAGER
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    facts: dict[str, tuple[float, int]] = {}
    failed: dict[tuple[str, str], str] = {}
    exact: torch.Tensor | None = None
    for one in wanted:
        advance()
        try:
            made = one.convert(_built(model, blocks, device))
            if compiled:
                _compile_blocks(made, list(model.depths))
            call = partial(made, **inputs, return_dict=False)
            for _ in range(WARM_UP):
                (y, *_) = call()
        except Exception as error:
            failed[one.name, way] = said_by(error)
            continue
        exact = y.float() if exact is None else exact
        facts[one.name] = float((y - exact).norm() / exact.norm()), stored_bytes(made)
        calls[one.name, way] = partial(_milliseconds, call, model.calls, device)
        if device.type != "cuda":
            continue
        try:
            calls[one.name, way + GRAPH] = partial(_milliseconds, _replayed(call, device), model.calls, device)
        except Exception as error:
            failed[one.name, way + GRAPH] = said_by(error)
    found, later = take_turns(calls, rounds, advance)
    reasons = failed | later
    for one in wanted:
        for how in (way, way + GRAPH):
            about = name, how, one.name, version_of(one.package)
            if (one.name, how) in found:
                of = Quartiles.of(found[one.name, how])
                yield Timing(*about, of.median, of.lower, of.upper, *facts[one.name])
            elif (one.name, how) in reasons:
                yield Timing(*about, reason=reasons[one.name, how])


def turns(names: Sequence[str], wanted: Sequence[Contender], rounds: int) -> int:
    """The most that :func:`measure` goes through."""
    return len(names) * len(wanted) * 2 * (1 + 2 * (rounds + 1))


@torch.no_grad()
def measure(
    names: Sequence[str],
    wanted: Sequence[Contender],
    device: torch.device,
    blocks: int | None = None,
    rounds: int = ROUNDS,
    advance: Callable[[], object] = no_matter,
) -> Iterator[Timing]:
    """Times of a step of each model in ``names``; of what is not installed, the reason. ``blocks``: of each kind, None
    as many as are published. ``advance`` is called at each of :func:`turns`.
    """
    installed = [one for one in wanted if version_of(one.package) is not None]
    # Blocks of all contenders are of one class, and each is compiled. A decorator would hold for no generator.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        for name in names:
            for one in wanted:
                if one not in installed:
                    yield Timing(name, "", one.name, None, reason=f"{one.package} is not installed")
            for compiled in (False, True):
                yield from _timings(name, MODELS[name], installed, device, blocks, rounds, compiled, advance)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def is_ours_and_failed(timing: Timing) -> bool:
    """Whether it is one of this library's, and has a reason in the place of a time."""
    return timing.reason is not None and timing.name.startswith("ditq_kernels ")


def speedup(timings: Sequence[Timing], timing: Timing, way: str) -> float | None:
    """How many times faster than the baseline is in ``way``, of the same model."""
    for one in timings:
        if (one.model, one.name, one.way) == (timing.model, BASELINE, way) and one.median and timing.median:
            return one.median / timing.median
    return None


def table(timings: Sequence[Timing]) -> str:
    """As Markdown, with the ratios to the baseline the same way and compiled."""
    lines = [
        "| model | | library | version | ms (quartiles) | to bf16 | to compiled bf16 | error to bf16 | GB kept |",
        "|---" * 9 + "|",
    ]
    for timing in timings:
        cells = [timing.model, timing.way, timing.name, timing.version or ""]
        if timing.median is None:
            cells += [timing.reason or "", "", "", "", ""]
        else:
            ratios = (speedup(timings, timing, way) for way in (timing.way, COMPILED))
            cells.append(f"{timing.median:.2f} ({timing.lower:.2f} to {timing.upper:.2f})")
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            cells += [f"{timing.error:.1e}", f"{timing.nbytes / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def record(timings: Sequence[Timing], blocks: int | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON."""
    return dict(**about, blocks=blocks, timings=[asdict(timing) for timing in timings])
