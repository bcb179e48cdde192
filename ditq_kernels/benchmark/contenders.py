"""Who takes part in a product: PyTorch's own ways, and ours in every scheme. :mod:`.peers` has other projects' kernels.

A contender prepares one case: it makes its operands, and says what the result has to be. It is a table's entry; adding
one is adding a line to :data:`TORCH` or :data:`ditq_kernels.benchmark.peers.PEERS`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..layer import reference
from ..layer.error_budget import PLAIN, Arithmetic, capability_of, product_oracle
from ..layer.formats import RECOMMENDED, WEIGHT_FORMATS, Scheme, WeightFormat
from ..layer.linear import QuantLinear
from ..layer.packed_weight import PackedWeight
from .cases import Case
from .checks import FP8_FAST_SUMS, OPERANDS_16_BIT, Check, check_product, checked_rows, poisoned_memory

if TYPE_CHECKING:
    from ..kernels.config import Config

DTYPE = torch.bfloat16
BASELINE = "cublas_bf16"
FEWEST_ROWS_OF_INT_MM = 17  # torch._int_mm raises below
FP8_CAPABILITY = 89


class Unavailable(Exception):
    """A contender cannot take part; the message is the reason."""


class Inputs:
    """What all contenders of a case are given, on one device, the same at every run.

    Attributes:
        x: [M, K], weight: [N, K], bias: [N], in :data:`DTYPE`.
        picked: the rows that are compared with an oracle.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def gaussian(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        self.case, self.device = case, device
        self.x = gaussian(case.rows, case.in_features).to(DTYPE)
        self.weight = (gaussian(case.out_features, case.in_features) * case.in_features**-0.5).to(DTYPE)
        self.bias = gaussian(case.out_features).to(DTYPE)
        self.picked = checked_rows(case.rows, device)
        self._layers: dict[WeightFormat, QuantLinear] = {}

    def linear(self) -> torch.nn.Linear:
        """A new layer with these weights, for peers that take one."""
        layer = torch.nn.Linear(self.case.in_features, self.case.out_features, device="meta", dtype=DTYPE)
        layer.weight = torch.nn.Parameter(self.weight.clone(), requires_grad=False)
        layer.bias = torch.nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer

    def stored(self, fmt: WeightFormat) -> QuantLinear:
        """Our layer with the weights in ``fmt``, quantized once."""
        if fmt not in self._layers:
            scheme = fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
            self._layers[fmt] = QuantLinear.from_linear(self.linear(), scheme)
        return self._layers[fmt]

    @functools.cached_property
    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes [M, K] and fp32 scales [M] of ``x``, by the reference."""
        return reference.quantize_activation(self.x)

    @functools.cached_property
    def amax(self) -> torch.Tensor:
        """fp32 [1], the reach that a calibration would find."""
        return self.x.abs().max().to(torch.float32).reshape(1)


@dataclass
class Prepared:
    """A contender, ready for one case.

    Attributes:
        call: ``call(*operands)`` gives [M, N].
        operands: tensors, modules and None; what a rotation copies.
        set_bytes: of the operands that one call reads; a bound from below will do.
        exact: the oracle, fp64 [rows, N], of the rows picked.
        budget, allowed: see :func:`.checks.check_product`.
        config: how our kernels were told, or chose, to compute it.
        note: what a reader of the number has to know.
        poisons: whether the check runs it into poisoned memory; compiled functions would be compiled anew for that.
    """

    call: Callable[..., torch.Tensor]
    operands: tuple[Any, ...]
    set_bytes: int
    exact: torch.Tensor
    budget: torch.Tensor | None = None
    allowed: float | None = None
    config: str | None = None
    note: str = ""
    poisons: bool = False


@dataclass(frozen=True)
class Contender:
    """Attributes:
    name: of its results.
    prepare: makes it ready; raises :class:`Unavailable` with the reason if it cannot take part in the case.
    family: "ours", "torch" or "peers".
    """

    name: str
    prepare: Callable[[Inputs], Prepared]
    family: str


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check(prepared: Prepared, inputs: Inputs) -> Check:
    """Run it once and compare."""
    with poisoned_memory() if prepared.poisons else contextlib.nullcontext():
        y = prepared.call(*prepared.operands)
    return check_product(y, inputs.picked, prepared.exact, prepared.budget, prepared.allowed)


def unquantized(inputs: Inputs) -> torch.Tensor:
    """fp64 product of the 16-bit operands, rows picked."""
    x = inputs.x[inputs.picked].to(torch.float64)
    return F.linear(x, inputs.weight.to(torch.float64), inputs.bias.to(torch.float64))


def _capability(inputs: Inputs) -> int:
    if inputs.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(inputs.device)
    return 10 * major + minor


# PyTorch


def _cublas(dtype: torch.dtype, inputs: Inputs) -> Prepared:
    operands = tuple(part.to(dtype) for part in (inputs.x, inputs.weight, inputs.bias))
    return Prepared(F.linear, operands, nbytes(*operands), unquantized(inputs), allowed=OPERANDS_16_BIT)


def _scaled(accumulator: torch.Tensor, sx: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What PyTorch has to do behind an integer product: another pass over [M, N]."""
    return (accumulator.to(torch.float32) * sx.unsqueeze(1) * scale + bias).to(DTYPE)


@functools.cache
def _scaled_compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(_scaled, dynamic=True)


def _int_mm(compiled: bool, inputs: Inputs) -> Prepared:
    if inputs.case.rows < FEWEST_ROWS_OF_INT_MM:
        raise Unavailable(f"torch._int_mm takes no fewer than {FEWEST_ROWS_OF_INT_MM} rows")
    layer = inputs.stored(WEIGHT_FORMATS["w8"])
    scaled = _scaled_compiled() if compiled else _scaled
    operands = (*inputs.codes, layer.qweight, layer.scale, inputs.bias)

    def call(qx, sx, qweight, scale, bias):
        return scaled(torch._int_mm(qx, qweight.T), sx, scale, bias)

    return Prepared(call, operands, nbytes(*operands), *int8_oracle(inputs, layer))


def _int_mm_alone(inputs: Inputs) -> Prepared:
    layer = inputs.stored(WEIGHT_FORMATS["w8"])
    (qx, _), w = inputs.codes, layer.qweight
    exact = qx[inputs.picked].to(torch.float64) @ w.to(torch.float64).T
    return Prepared(_accumulators, (qx, w), nbytes(qx, w), exact, allowed=0.0, note="accumulators only")


def _accumulators(qx: torch.Tensor, qweight: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(qx, qweight.T)


def _to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, fp32 scales [rows, 1])."""
    scale = x.to(torch.float32).abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x.to(torch.float32) / scale).to(torch.float8_e4m3fn), scale


def _fp8(inputs: Inputs) -> Prepared:
    if _capability(inputs) < FP8_CAPABILITY:
        raise Unavailable(f"fp8 products need compute capability {FP8_CAPABILITY / 10} or later")
    (x, sx), (w, sw) = _to_fp8(inputs.x), _to_fp8(inputs.weight)
    operands = (x, sx, w, sw.T.contiguous(), inputs.bias)

    def call(x, sx, w, sw, bias):
        return torch._scaled_mm(x, w.T, sx, sw, bias=bias, out_dtype=DTYPE, use_fast_accum=True)

    values = x[inputs.picked].to(torch.float64) * sx[inputs.picked].to(torch.float64)
    exact = F.linear(values, w.to(torch.float64) * sw.to(torch.float64), inputs.bias.to(torch.float64))
    return Prepared(call, operands, nbytes(*operands), exact, allowed=FP8_FAST_SUMS, note="fast accumulation")


TORCH = (
    Contender(BASELINE, functools.partial(_cublas, torch.bfloat16), "torch"),
    Contender("cublas_fp16", functools.partial(_cublas, torch.float16), "torch"),
    Contender("int_mm+scaling compiled", functools.partial(_int_mm, True), "torch"),
    Contender("int_mm+scaling eager", functools.partial(_int_mm, False), "torch"),
    Contender("scaled_mm fp8 rowwise", _fp8, "torch"),
)

# Ours


def int8_oracle(
    inputs: Inputs, layer: QuantLinear, codes: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact, budget) of int8 activations times ``layer``'s weights, rows picked."""
    qx, sx = (part[inputs.picked] for part in codes or inputs.codes)
    x = qx.to(torch.float64) * sx.to(torch.float64).unsqueeze(1)
    return product_oracle(x, layer.dequantized_weight(), inputs.bias, DTYPE)


def a16_oracle(inputs: Inputs, layer: QuantLinear, arithmetic: Arithmetic = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact, budget) of 16-bit activations times ``layer``'s weights, rows picked."""
    x, capability = inputs.x[inputs.picked], capability_of(inputs.device)
    return product_oracle(x, layer.dequantized_weight(), inputs.bias, DTYPE, arithmetic, capability)


def arithmetic_of(config: Config | None, activation_bytes: int) -> Arithmetic:
    """What a product by ``config`` does to numbers; None stands for the reference."""
    if config is None:
        return PLAIN
    from ..kernels.config import arithmetic

    return arithmetic(config, activation_bytes)


def _dispatch() -> ModuleType:
    """The kernels by configuration, imported when there is something to launch."""
    from ..kernels import dispatch

    return dispatch


def _route_config(x: torch.Tensor, inputs: Inputs, fmt: WeightFormat, route: str | None):
    """(config to pass, or None for the one that is chosen; the one that runs). CPU tensors have neither."""
    if inputs.device.type != "cuda":
        if route is not None:
            raise Unavailable(f"route {route!r} takes CUDA tensors")
        return None, None
    from ..kernels import config, device, dispatch, estimates, tables

    problem = dispatch.problem_of(x, inputs.case.out_features, fmt)
    if route is None:
        return None, tables.choose(problem, device.describe(inputs.device).name)
    possible = [candidate for candidate in config.candidates(problem) if candidate.route == route]
    if not possible:
        raise Unavailable(f"no configuration of route {route!r} is valid (not built, not loaded, or not for {problem})")
    best = min(possible, key=lambda candidate: estimates.estimate(candidate, problem))
    return best, best


def _name(config: Config | None) -> str | None:
    return None if config is None else str(config)


def _ours_a8(scheme: Scheme, quantizes: bool, route: str | None, inputs: Inputs) -> Prepared:
    if inputs.case.modulation:
        raise Unavailable("modulation layers take 16-bit activations in every scheme")
    fmt = scheme.weight
    layer = inputs.stored(fmt)
    weight = (layer.qweight, layer.scale, layer.group_code, layer.bias)
    amax = inputs.amax if scheme.static else None
    codes = reference.quantize_activation(inputs.x, amax)
    chosen, runs = _route_config(codes[0], inputs, fmt, route)

    def product(qx, sx, *weight):
        if chosen is not None:
            *parts, bias = weight
            packed = PackedWeight(*parts, fmt, inputs.case.in_features)
            return _dispatch().linear_a8(qx, sx, packed, bias, DTYPE, config=chosen)
        return torch.ops.ditq.linear_a8(qx, sx, *weight, fmt.name, DTYPE)

    def quantize_and_multiply(x, amax, *weight):
        return product(*torch.ops.ditq.quantize_activation(x, amax), *weight)

    operands = (inputs.x, amax, *weight) if quantizes else (*codes, *weight)
    call = quantize_and_multiply if quantizes else product
    oracle = int8_oracle(inputs, layer, codes)
    return Prepared(call, operands, nbytes(*operands), *oracle, config=_name(runs), poisons=True)


def _ours_a16(scheme: Scheme, route: str | None, inputs: Inputs) -> Prepared:
    fmt = scheme.weight
    layer = inputs.stored(fmt)
    operands = (inputs.x, layer.qweight, layer.scale, layer.group_code, layer.bias)
    chosen, runs = _route_config(inputs.x, inputs, fmt, route)

    def call(x, *weight):
        if chosen is not None:
            *parts, bias = weight
            return _dispatch().linear_a16(x, PackedWeight(*parts, fmt, inputs.case.in_features), bias, config=chosen)
        return torch.ops.ditq.linear_a16(x, *weight, fmt.name, False)

    oracle = a16_oracle(inputs, layer, arithmetic_of(runs, inputs.x.element_size()))
    return Prepared(call, operands, nbytes(*operands), *oracle, config=_name(runs), poisons=True)


def ours(schemes: tuple[str, ...] = (*RECOMMENDED, "w8a16")) -> tuple[Contender, ...]:
    """Contenders of ``schemes``: with 8-bit activations "<scheme>" includes their quantization and "<scheme> product"
    does not; with 16-bit activations just "<scheme>". " cuda" behind a product's name: by the extension's kernel.

    Raises:
        ValueError: for an unknown scheme.
    """
    found = []
    for scheme in map(Scheme.parse, schemes):
        if scheme.activation.bits == 16:
            found.append(Contender(scheme.name, functools.partial(_ours_a16, scheme, None), "ours"))
            found.append(Contender(f"{scheme.name} cuda", functools.partial(_ours_a16, scheme, "cuda"), "ours"))
            continue
        found.append(Contender(scheme.name, functools.partial(_ours_a8, scheme, True, None), "ours"))
        if not scheme.static:  # the product is the same
            product = f"{scheme.name} product"
            found.append(Contender(product, functools.partial(_ours_a8, scheme, False, None), "ours"))
            found.append(Contender(f"{product} cuda", functools.partial(_ours_a8, scheme, False, "cuda"), "ours"))
    return tuple(found)


def ceiling_contenders() -> tuple[Contender, ...]:
    """Those whose largest product is the roof for their kind of operands."""
    wanted = (BASELINE, "w8a8 product", "w8a8 product cuda", "scaled_mm fp8 rowwise")
    known = {contender.name: contender for contender in (*TORCH, *ours(("w8a8",)))}
    return (*(known[name] for name in wanted), Contender("int_mm", _int_mm_alone, "torch"))
