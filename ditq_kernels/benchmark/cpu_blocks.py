"""``ditq bench --device cpu``: how long blocks of diffusion transformers take on this CPU, quantized and not, beside
the libraries that a user would pick instead, each through the interface that its documentation shows.

All take turns, round by round, on the same input; a figure is the median over rounds. Weights are random: no time
depends on them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .libraries import RECOMPILE_LIMIT, Contender, ours, sdnq_int8, torchao_int8, unchanged
from .quantizing import stored_bytes
from .turns import Quartiles, no_matter, said_by, take_turns, version_of

ROUNDS = 7
QUICK_ROUNDS = 3
SECONDS_OF_A_TURN = 0.3  # calls are repeated to fill it, at most MOST_CALLS of them
MOST_CALLS = 20
BASELINES = {"PyTorch bf16": torch.bfloat16, "PyTorch fp32": torch.float32}


@dataclass(frozen=True)
class Subject:
    """What is run: a block of a DiT.

    Attributes:
        heads, channels: attention heads, and channels of each.
        side, batch: tokens along each side of a picture, and pictures.
    """

    name: str
    heads: int
    channels: int
    side: int
    batch: int


SUBJECTS = (
    Subject("DiT-XL/2 block, 1024 tokens", 16, 72, 32, 1),
    Subject("block of the demo's model, 10 x 196 tokens", 4, 64, 14, 10),
)


CONTENDERS = (
    *(Contender(name, "torch", unchanged) for name in BASELINES),
    *(Contender(f"ditq_kernels {scheme}", None, partial(ours, scheme=scheme)) for scheme in ("w8a8", "w4a8_g128")),
    Contender("ditq_kernels w8a8, unfused", None, partial(ours, scheme="w8a8", fused=False)),
    Contender("torchao int8", "torchao", torchao_int8),
    Contender("sdnq int8", "sdnq", sdnq_int8),
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, of one contender on one subject.

    Attributes:
        compiled: by ``torch.compile``.
        dtype: of the input and of what is not quantized.
        median, lower, upper: over rounds, with the quartiles.
        error: of the output, relative to what fp32 computes.
        nbytes: of all that the block keeps.
        reason: why there is nothing else.
    """

    name: str
    subject: str
    compiled: bool
    dtype: str
    version: str | None
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    error: float | None = None
    nbytes: int | None = None
    reason: str | None = None


def natural_dtype() -> torch.dtype:
    """bf16 where the CPU computes with it; where PyTorch would emulate it, fp32."""
    has = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if any(has) else torch.float32


class _Block(nn.Module):
    """The block of a model, with all that it is called with."""

    def __init__(self, model: nn.Module, subject: Subject) -> None:
        super().__init__()
        self.block = model.transformer_blocks[0]
        self.register_buffer("steps", torch.arange(subject.batch) * 31 % 1000, persistent=False)
        self.register_buffer("classes", torch.arange(subject.batch) * 17 % 1000, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, timestep=self.steps, class_labels=self.classes)


def _plain(subject: Subject) -> tuple[nn.Module, torch.Tensor]:
    """A model with one block, and the block's input, both fp32."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=subject.heads,
            attention_head_dim=subject.channels,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            patch_size=2,
            sample_size=2 * subject.side,
        )
        x = torch.randn(subject.batch, subject.side**2, subject.heads * subject.channels)
        return model.eval().requires_grad_(False), x


def _milliseconds(call: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return 1000 * (time.perf_counter() - started) / calls


def _timings(
    subject: Subject, contenders: Sequence[Contender], compiled: bool, rounds: int, advance: Callable[[], object]
) -> Iterator[Timing]:
    plain, x = _plain(subject)
    exact = _Block(plain, subject)(x)
    torch.compiler.reset()
    calls: dict[str, Callable[[], float]] = {}
    facts: dict[str, tuple[Any, ...]] = {}
    results: dict[str, tuple[float, int]] = {}
    failed: dict[str, str] = {}
    for one in contenders:
        advance()
        dtype = BASELINES.get(one.name, natural_dtype())
        facts[one.name] = (one.name, subject.name, compiled, str(dtype).removeprefix("torch."), version_of(one.package))
        try:
            mine = nn.Module.to(copy.deepcopy(plain), dtype)  # diffusers' own says that it casts
            block = _Block(one.convert(mine), subject)
            stored = stored_bytes(block)
            call = partial(torch.compile(block) if compiled else block, x.to(dtype))
            y = call()
            count = min(MOST_CALLS, max(1, int(1000 * SECONDS_OF_A_TURN / _milliseconds(call, 1))))
        except Exception as error:
            failed[one.name] = said_by(error)
            continue
        results[one.name] = float((y - exact).norm() / exact.norm()), stored
        calls[one.name] = partial(_milliseconds, call, count)
    found, later = take_turns(calls, rounds, advance)
    for one in contenders:
        reason = (failed | later).get(one.name)
        if reason is not None:
            yield Timing(*facts[one.name], reason=reason)
            continue
        of = Quartiles.of(found[one.name])
        yield Timing(*facts[one.name], of.median, of.lower, of.upper, *results[one.name])


def steps(subjects: Sequence[Subject], contenders: Sequence[Contender], compiled: Sequence[bool], rounds: int) -> int:
    """The most that :func:`measure` goes through: each contender is prepared, warms up and has its turns."""
    return len(subjects) * len(contenders) * len(compiled) * (rounds + 2)


@torch.no_grad()
def measure(
    subjects: Sequence[Subject] = SUBJECTS,
    contenders: Sequence[Contender] = CONTENDERS,
    compiled: Sequence[bool] = (False, True),
    rounds: int = ROUNDS,
    advance: Callable[[], object] = no_matter,
) -> Iterator[Timing]:
    """Times on each subject, eager and compiled; of what is not installed, the reason. ``advance`` is called at each of
    :func:`steps`.
    """
    installed = [one for one in contenders if version_of(one.package) is not None]
    # All blocks are of one class, and each is compiled. A decorator would hold for no generator.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        for subject in subjects:
            for compiles in compiled:
                for one in contenders:
                    if one not in installed:
                        reason = f"{one.package} is not installed"
                        yield Timing(one.name, subject.name, compiles, "", None, reason=reason)
                yield from _timings(subject, installed, compiles, rounds, advance)


def is_ours_and_failed(timing: Timing) -> bool:
    """Whether it is one of this library's, and has a reason in the place of a time."""
    return timing.reason is not None and timing.name in {one.name for one in CONTENDERS if one.package is None}


def speedup(timings: Sequence[Timing], timing: Timing, baseline: str) -> float | None:
    """How many times faster than ``baseline`` it is, which ran beside it."""
    for one in timings:
        if (one.name, one.subject, one.compiled) == (baseline, timing.subject, timing.compiled):
            return one.median / timing.median if one.median and timing.median else None
    return None


def table(timings: Sequence[Timing]) -> str:
    """As Markdown, with the ratio to each of :data:`BASELINES`."""
    ratios = [f"to {name}" for name in BASELINES]
    lines = [
        f"| what | | library | version | ms (quartiles) | {' | '.join(ratios)} | relative error | MB kept |",
        "|---" * (7 + len(ratios)) + "|",
    ]
    for timing in timings:
        how = ("compiled" if timing.compiled else "eager") + (f" {timing.dtype}" if timing.dtype else "")
        cells = [timing.subject, how, timing.name, timing.version or ""]
        if timing.median is None:
            cells += [timing.reason or "", *("" for _ in ratios), "", ""]
        else:
            cells.append(f"{timing.median:.2f} ({timing.lower:.2f} to {timing.upper:.2f})")
            for name in BASELINES:
                ratio = speedup(timings, timing, name)
                cells.append("" if ratio is None else f"{ratio:.2f}")
            cells += [f"{timing.error:.1e}", f"{timing.nbytes / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def record(timings: Sequence[Timing], about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON."""
    return dict(**about, timings=[asdict(timing) for timing in timings])
