"""What happens to activations between products: quantization, alone and fused behind GELU and behind LayerNorm and
modulation. All of it is bound by memory; its measure is the bandwidth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..layer.error_budget import gelu_error, norm_budget, norm_error
from .cases import Case
from .checks import Check, check_codes, check_product, checked_rows, poisoned_memory
from .contenders import DTYPE

BATCH = 2  # samples that the rows are divided among, where a sample has a modulation
EPS = 1e-6
PLAIN = "layernorm+modulate"


@dataclass(frozen=True)
class Pass:
    """One pass over x [M, K], ready to run.

    Attributes:
        call: ``call(*operands)``.
        moved: bytes that have to be read and written.
        check: of the result.
    """

    call: Callable[..., Any]
    operands: tuple[Any, ...]
    moved: int
    check: Callable[[Any], Check]

    def verify(self) -> Check:
        with poisoned_memory():
            return self.check(self.call(*self.operands))


def _activations(case: Case, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(case.rows, case.in_features, generator=generator, device=device, dtype=torch.float32)
    return x.to(DTYPE)


def _moved(case: Case, written_per_value: int, scales: bool) -> int:
    values = case.rows * case.in_features
    return values * (DTYPE.itemsize + written_per_value) + (4 * case.rows if scales else 0)


def _quantize(static: bool, gelu: str | None, case: Case, device: torch.device) -> Pass:
    x = _activations(case, device)
    picked = checked_rows(case.rows, device)

    def exactly(x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float64)
        return x if gelu is None else F.gelu(x, approximate=gelu)

    amax = exactly(x).abs().max().to(torch.float32).reshape(1) if static else None
    call = torch.ops.ditq.quantize_activation if gelu is None else functools.partial(_gelu_quantize, gelu)

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> Check:
        codes, scales = result
        rows = x[picked]
        error = gelu_error(rows) if gelu else torch.zeros(len(rows), dtype=torch.float64, device=device)
        return check_codes(codes[picked], scales[picked], exactly(rows), error, amax)

    return Pass(call, (x, amax), _moved(case, 1, True), check)


def _gelu_quantize(form: str, x: torch.Tensor, amax: torch.Tensor | None):
    return torch.ops.ditq.gelu_quantize(x, amax, form)


def _norm(quantizes: bool, case: Case, device: torch.device) -> Pass:
    """LayerNorm without weight and bias, as adaLN has it, then ``* (1 + scale) + shift``."""
    batch = BATCH if case.rows % BATCH == 0 else 1
    x = _activations(case, device).view(batch, -1, case.in_features)
    shift, scale = (_activations(Case(batch, 1, case.in_features), device, seed) for seed in (1, 2))
    picked = checked_rows(case.rows, device)

    def normed() -> torch.Tensor:
        parts = (part.repeat_interleave(case.rows // batch, 0)[picked].to(torch.float64) for part in (shift, scale))
        offset, gain = parts
        rows = x.flatten(0, 1)[picked].to(torch.float64)
        return F.layer_norm(rows, rows.shape[-1:], eps=EPS) * (1 + gain) + offset

    def check(result: Any) -> Check:
        exact = normed()
        if quantizes:
            codes, scales = result
            return check_codes(codes[picked], scales[picked], exact, norm_error(exact))
        return check_product(result.flatten(0, 1), picked, exact, norm_budget(exact, DTYPE), None)

    def call(x, shift, scale):
        if quantizes:
            return torch.ops.ditq.norm_modulate_quantize(x, None, None, shift, scale, None, EPS)
        return torch.ops.ditq.norm_modulate(x, None, None, shift, scale, EPS)

    moved = _moved(case, 1 if quantizes else DTYPE.itemsize, quantizes)
    return Pass(call, (x, shift, scale), moved, check)


@dataclass(frozen=True)
class PassContender:
    """Attributes:
    name: of its results.
    prepare: makes it ready for x [M, K] of a case.
    """

    name: str
    prepare: Callable[[Case, torch.device], Pass]


PASSES = (
    PassContender("quantize", functools.partial(_quantize, False, None)),
    PassContender("quantize static", functools.partial(_quantize, True, None)),
    PassContender("gelu+quantize", functools.partial(_quantize, False, "tanh")),
    PassContender("gelu+quantize static", functools.partial(_quantize, True, "tanh")),
    PassContender(PLAIN, functools.partial(_norm, False)),
    PassContender("layernorm+modulate+quantize", functools.partial(_norm, True)),
)
