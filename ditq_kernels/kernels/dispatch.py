"""A product to one of the ways to compute it, by the configuration chosen for its problem or given."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..layer import extension
from ..layer.formats import WeightFormat
from ..layer.gated_residual import GatedResidual
from ..layer.packed_weight import PackedWeight
from . import tables
from .config import Config, Problem, adds_residuals, row_class
from .dense_product import dense_product
from .device import Device, describe, launch_device
from .expansion import expanded_product
from .in_loop_product import in_loop_product
from .operands import Operands
from .small_product import small_product

# Routes that apply SiLU while they load activations; before the others it is a pass of its own.
LOADS_WITH_SILU = ("small", "in_loop", "cuda")
HALF_PRECISION = (torch.bfloat16, torch.float16)  # what measurements of the extension speak of


@functools.lru_cache(maxsize=4096)
def _problem(
    rows: int,
    out_features: int,
    in_features: int,
    activation_bytes: int,
    fmt: WeightFormat,
    device: Device,
    output_bytes: int,
    adds: bool = False,
) -> Problem:
    place = device.capability, device.multiprocessors
    return Problem(rows, out_features, in_features, activation_bytes, fmt, *place, output_bytes, adds)


def problem_of(x: torch.Tensor, out_features: int, fmt: WeightFormat, out_dtype: torch.dtype | None = None) -> Problem:
    """What a product of ``x`` [M, K] with an [N, K] weight in ``fmt`` is chosen by; ``out_dtype`` None: the dtype of
    ``x``, or one of 16 bits if ``x`` is int8.
    """
    rows, in_features = x.shape
    output_bytes = out_dtype.itemsize if out_dtype else max(x.element_size(), 2)
    return _problem(row_class(rows), out_features, in_features, x.element_size(), fmt, describe(x.device), output_bytes)


@functools.lru_cache(maxsize=4096)
def _chosen(
    rows: int,
    out_features: int,
    in_features: int,
    activation_bytes: int,
    fmt: WeightFormat,
    device: Device,
    output_bytes: int,
    may_be_extension: bool,
    adds: bool = False,
) -> Config:
    problem = _problem(rows, out_features, in_features, activation_bytes, fmt, device, output_bytes, adds)
    return tables.choose(problem, device.name, may_be_extension)


VECTOR_BYTES = 16  # at whose multiples the extension's int8 operands begin


def takes_extension(x: torch.Tensor, out_dtype: torch.dtype, qweight: torch.Tensor | None = None) -> bool:
    """Whether the CUDA extension may be chosen: for tensors that it can read, and dtypes that it was timed with."""
    if not (x.is_cuda and out_dtype in HALF_PRECISION):
        return False
    address = x.data_ptr() | (0 if qweight is None else qweight.data_ptr())
    return x.dtype != torch.int8 or address % VECTOR_BYTES == 0


def chosen(
    x: torch.Tensor,
    out_features: int,
    fmt: WeightFormat,
    out_dtype: torch.dtype,
    qweight: torch.Tensor | None = None,
    adds: bool = False,
) -> Config:
    """The configuration that a product of ``x`` [M, K] with an [N, K] weight in ``fmt`` runs by if none is given.
    ``qweight``: as stored, None for one that begins where an allocation does; ``adds``: whether to a residual.
    """
    rows, in_features = x.shape
    of_x = in_features, x.element_size(), fmt, describe(x.device)
    may_be_extension = takes_extension(x, out_dtype, qweight)
    return _chosen(row_class(rows), out_features, *of_x, out_dtype.itemsize, may_be_extension, adds)


def _int8_product(operands: Operands, config: Config, multiprocessors: int) -> torch.Tensor:
    y = operands.output()
    weight = operands.weight
    parts = operands.sx, weight.scale, operands.bias
    dense_product(operands.x, weight.qweight, *parts, y, config, multiprocessors, operands.added)
    return y


def _extension_product(operands: Operands, config: Config) -> torch.Tensor:
    x, sx, weight, bias, out_dtype, silu, _ = operands
    if sx is None:
        return extension.linear_a16(x, weight, bias, silu)
    return extension.linear_a8(x, sx, weight, bias, out_dtype, config.instance)


def product(operands: Operands, config: Config | None = None) -> torch.Tensor:
    """[M, N] of ``operands``; ``config`` None takes the one chosen for the problem."""
    x, weight = operands.x, operands.weight
    out_features = weight.out_features
    if not (x.shape[0] and out_features):
        return operands.output()
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    device = describe(x.device)
    if config is None:
        adds = operands.added is not None
        config = chosen(x, out_features, weight.fmt, operands.out_dtype, weight.qweight, adds)
    added = operands.added
    if added is not None and not adds_residuals(config):
        return added.plus(product(operands._replace(added=None), config))
    if operands.silu and config.route not in LOADS_WITH_SILU:
        x, operands = F.silu(x), operands._replace(silu=False)
    operands = operands._replace(x=x)
    with launch_device(x):
        if config.route == "small":
            return small_product(operands, config)
        if config.route == "in_loop":
            return in_loop_product(operands, config)
        if config.route.startswith("expanded"):
            return expanded_product(operands, config, device.multiprocessors)
        if config.route == "cuda":
            return _extension_product(operands, config)
        return _int8_product(operands, config, device.multiprocessors)


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
    added: GatedResidual | None = None,
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.linear_a8`; ``config`` None takes the one chosen for the problem."""
    return product(Operands(qx, sx.contiguous(), weight, bias, out_dtype, added=added), config)


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.linear_a16`; sums in fp32 over activations in their own dtype.
    ``config`` None takes the one chosen for the problem.
    """
    return product(Operands(x, None, weight, bias, x.dtype, silu), config)
