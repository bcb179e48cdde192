"""How far from the exact result a right one may be: the one budget of tests and benchmarks, from an analysis of the
arithmetic.

A sum of n terms in fp32, in any order, is off by at most ``n * u * sum|terms|``, u = 2**-24 being the largest relative
error of one rounding. Roundings err to either side and mostly cancel: by at most ``LAMBDA * sqrt(n) * u * sum|terms|``
but with a probability of no more than ``2 * exp(-LAMBDA**2 / 2)`` (N. J. Higham and T. Mary, "A New Approach to
Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019), and that bound itself takes every rounding to be
as bad as it can be. Up to n = 16 the first bound is the smaller one: there nothing is left to chance.

Matrix instructions of GPUs do not round but cut off, always towards zero, so that nothing cancels: with their sums a
term linear in K is added (:data:`MATRIX_UNITS`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

FP32_ROUNDING = 2.0**-24  # u: largest relative error of one rounding to fp32
LAMBDA = 4.0
# fp32 roundings of a product beside those of its sum: that of the oracle's weight (integer times scale, where a kernel
# scales the sum), the accumulator's conversion from int32, two scales, and the bias, which counts as one more term.
OTHER_ROUNDINGS = 5
# (products that are added at a time, fraction bits that are kept of each summand) of the matrix unit for 16-bit
# operands, by the major compute capability. The products are exact. They and the accumulator are aligned to the largest
# exponent among them, cut off behind the fraction bits kept, and added exactly; the sum is cut off to fp32.
# Measured: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Comput.
# Sci. 7:e330, 2021 (the scheme, up to sm_80); F. A. Khattak, M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores",
# arXiv 2512.07004, 2025 (sm_80, 89, 90, 100); P. Xie et al., "MMA-Sim", arXiv 2511.10909, 2025 (these and sm_120).
MATRIX_UNITS = {8: (8, 24), 9: (16, 25), 10: (16, 25), 12: (16, 25)}
# SiLU in fp32: the negation, exponential (2 units of the last place where it is approximated), sum and quotient; the
# exponential's argument is rounded too, which the exponential multiplies by the argument.
SILU_ROUNDINGS = 8
# The exponential of GELU's two forms, or erf, and what stands around it, relative to the largest |x| of a row.
GELU_ROUNDINGS = 16
# Mean, variance (each a tree of additions: at most 14 levels), normalization and modulation, relative to the largest
# |y| of a row. The mean of the row must not be far above its deviation.
NORM_ROUNDINGS = 32


@dataclass(frozen=True)
class Arithmetic:
    """What a way to compute a product does beside multiplying and adding in fp32.

    Attributes:
        rounds_weight, rounds_bias: whether the scaled weight, or the bias, is rounded to the output's dtype first.
        matrix_instructions: whether a GPU's matrix instructions add up the products.
    """

    rounds_weight: bool = False
    rounds_bias: bool = False
    matrix_instructions: bool = False


PLAIN = Arithmetic()


def capability_of(device: torch.device) -> int | None:
    """10 * major + minor of a GPU, whose matrix instructions cut off; None of a CPU, which rounds."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def lost_per_product(capability: int) -> float:
    """What matrix instructions of ``capability`` cut off at most for every product of a sum, in units of
    ``2**-24 * sum|x * w|``; of a capability not listed, the largest of those that are.

    Of the summands added at a time, the one with the largest exponent fits. Each other one loses less than
    ``2**-bits`` of the largest magnitude; there are as many of them as products. Then the sum loses less than 2**-23 of
    itself. No summand is larger than ``sum|x * w|``.
    """
    units = {capability // 10: MATRIX_UNITS[capability // 10]} if capability // 10 in MATRIX_UNITS else MATRIX_UNITS
    return max((2.0**-bits + 2.0**-23 / products) / FP32_ROUNDING for products, bits in units.values())


def rounding(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64: the largest error of rounding magnitudes up to ``value``, fp64, to ``dtype`` once, to nearest."""
    info = torch.finfo(dtype)
    return (info.eps * value.abs()).clamp(min=info.smallest_normal * info.eps) / 2


def product_oracle(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    arithmetic: Arithmetic = PLAIN,
    capability: int | None = None,
    x_error: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact result, largest error of a right one), both fp64 [M, N], of ``x @ w.T + bias`` summed in fp32 and rounded
    to ``dtype`` once: ``LAMBDA * sqrt(K + OTHER_ROUNDINGS) * 2**-24 * (|x| @ |w|.T + |bias|)`` and that rounding.

    Args:
        x: [M, K]; of int8 codes, codes times scales in fp64. w: [N, K], the dequantized weight. bias: [N] or None.
        dtype: of the output.
        arithmetic: of the way it is computed.
        capability: of the GPU that computes it, see :func:`capability_of`; None stands for rounded sums.
        x_error: fp64 [M, K], how far an entry of ``x`` may be from what is multiplied; see :func:`silu_operand`.
    """
    if arithmetic.rounds_weight:
        w = w.to(dtype)
    if arithmetic.rounds_bias and bias is not None:
        bias = bias.to(dtype)
    x, w = x.to(torch.float64), w.to(torch.float64)
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    in_features = x.shape[1]
    if bias is not None:
        exact, magnitude = exact + bias.to(torch.float64), magnitude + bias.to(torch.float64).abs()
    roundings = LAMBDA * (in_features + OTHER_ROUNDINGS) ** 0.5
    if arithmetic.matrix_instructions and capability is not None:
        roundings += lost_per_product(capability) * in_features
    budget = roundings * FP32_ROUNDING * magnitude
    if x_error is not None:
        budget += x_error @ w.abs().T
    return exact, budget + rounding(exact.abs() + budget, dtype)


def silu_operand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(SiLU of ``x`` rounded to its dtype, how far another right one may be from it), both fp64 in the shape of ``x``:
    SiLU in fp32 may fall on either side of a tie. The second is zero nearly everywhere if ``x`` has 16 bits.
    """
    wide = x.to(torch.float64)
    value = F.silu(wide)
    slack = (SILU_ROUNDINGS + wide.abs()) * FP32_ROUNDING * value.abs()
    slack += wide.abs() * 2.0**-128  # an exponential above 2**128 is infinite, and SiLU then zero
    low, high = (bound.to(x.dtype).to(torch.float64) for bound in (value - slack, value + slack))
    return (low + high) / 2, (high - low) / 2


def gelu_error(x: torch.Tensor) -> torch.Tensor:
    """fp64 [rows]: the largest error of GELU of ``x`` [rows, K] in fp32."""
    return GELU_ROUNDINGS * FP32_ROUNDING * x.to(torch.float64).abs().amax(1)


def norm_error(exact: torch.Tensor) -> torch.Tensor:
    """fp64 [rows]: the largest error of a normalized and modulated row in fp32; ``exact``, fp64 [rows, K], is right."""
    return NORM_ROUNDINGS * FP32_ROUNDING * exact.abs().amax(1)


def norm_budget(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 [rows, K]: :func:`norm_error`, and one rounding to ``dtype``."""
    error = norm_error(exact).unsqueeze(1)
    return error + rounding(exact.abs() + error, dtype)


def rotation_oracle(
    x: torch.Tensor, norm: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact, budget), fp64, of ``x`` [B, S, H, D] normalised over D, rounded to its dtype and rotated, where there are
    angles, as :func:`.reference.attention_inputs` does; two products and a sum of each pair of channels.
    """
    weight = None if norm is None else norm.double()
    normed = F.rms_norm(x.double(), x.shape[-1:], weight, eps)
    error = NORM_ROUNDINGS * FP32_ROUNDING * normed.abs()
    error = error + rounding(normed.abs() + error, x.dtype)
    if cos is None:
        return normed, error

    def turned(value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
        even, odd = value.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack([sign * odd, even], -1).flatten(3)
        return value * cos[None, :, None, :] + other * sin[None, :, None, :]

    exact = turned(normed, cos.double(), sin.double(), -1)
    size = turned(normed.abs() + error, cos.double().abs(), sin.double().abs(), 1)
    budget = turned(error, cos.double().abs(), sin.double().abs(), 1) + 3 * FP32_ROUNDING * size
    return exact, budget + rounding(exact.abs() + budget, x.dtype)


def worst_share_of_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    exact: torch.Tensor,
    error: torch.Tensor,
    smallest_amax: float,
    amax: torch.Tensor | None = None,
) -> float:
    """As :func:`worst_share`, of int8 ``codes`` [rows, K] and fp32 ``scales`` [rows] together. A code may be half a
    step from the exact value, and what fp32 arithmetic before it is off by: so it is the nearest one, or one beside a
    tie.

    Args:
        exact: fp64 [rows, K], what is quantized. error: fp64 [rows], the largest error that it already has.
        smallest_amax: the reach of rows that reach no further.
        amax: [1], the calibrated reach, or None.
    """
    reach = exact.abs().amax(1) if amax is None else amax.to(torch.float64).expand(exact.shape[0])
    reach = reach.clamp(min=smallest_amax)
    scaled = (exact * (127 / reach).unsqueeze(1)).clamp(-127, 127)
    # The error of the value and that of the reach that it is divided by; then the quotient's and the product's.
    slack = 2 * 127 * error / reach + 2 * 128 * FP32_ROUNDING
    of_codes = worst_share(codes, scaled, (0.5 + slack).unsqueeze(1).expand_as(scaled))
    return max(of_codes, worst_share(scales, reach / 127, (error + 2 * FP32_ROUNDING * reach) / 127))


def worst_share(actual: torch.Tensor, exact: torch.Tensor, budget: torch.Tensor) -> float:
    """Largest share of ``budget`` that ``actual`` is off by from ``exact``, all of one shape: a right result has 1 at
    most. Infinite if ``actual`` is not finite everywhere, or errs where nothing is allowed.
    """
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    error = (actual.to(torch.float64) - exact).abs()
    shares = torch.where(error == 0, 0.0, error / budget)
    return float(shares.max()) if shares.numel() else 0.0
