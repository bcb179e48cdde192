"""Other projects' kernels, each through the interface that its documentation shows. What is not installed, or does not
take a case, gives its reason.

Their weights are quantized by their own rules, so that their results are compared with the unquantized product, within
what a quantization to that many bits costs. Sources: the README of GemLite 0.6, the README of humming-kernels 0.1.19,
and the documentation of torchao's ``quantize_``. Their GPU kernels have not run here yet.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..layer.formats import CODE4_MAX
from .checks import OPERANDS_8_BIT, WEIGHTS_4_BIT
from .contenders import DTYPE, Contender, Inputs, Prepared, Unavailable, nbytes, unquantized

GROUP = 128
PACKAGES = ("torchao", "gemlite", "humming-kernels")


def versions() -> dict[str, str | None]:
    """Installed versions of the peers; None where one is missing."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _need(package: str) -> str:
    version = versions()[package]
    if version is None:
        raise Unavailable(f"{package} is not installed")
    return version


def _call_module(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def _prepared(
    inputs: Inputs, module: Any, weight_bits: int, version: str, allowed: float, bias: bool = True
) -> Prepared:
    exact = unquantized(inputs)
    if not bias:
        exact = exact - inputs.bias.to(torch.float64)
    stored = inputs.weight.numel() * weight_bits // 8
    note = version if bias else f"{version}; without bias"
    return Prepared(_call_module, (module, inputs.x), stored + nbytes(inputs.x), exact, allowed=allowed, note=note)


def _torchao(weight_bits: int, inputs: Inputs) -> Prepared:
    version = _need("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    config = (
        Int8DynamicActivationInt8WeightConfig()
        if weight_bits == 8
        else Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    )
    layer = torch.nn.Sequential(inputs.linear())
    quantize_(layer, config)
    weight = layer[0].weight
    # Eager, torchao's dynamic quantization is many passes; compiled is how its documentation runs it. Each shape is
    # compiled for itself, and there are more shapes than dynamo compiles one function for by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
    exact, allowed = unquantized(inputs), OPERANDS_8_BIT if weight_bits == 8 else WEIGHTS_4_BIT
    stored = inputs.weight.numel() * weight_bits // 8 + nbytes(inputs.x)
    note = f"{version}; torch.compile"
    return Prepared(_linear_compiled(), (inputs.x, weight, inputs.bias), stored, exact, allowed=allowed, note=note)


@functools.cache
def _linear_compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(F.linear, dynamic=False)


def _gemlite_a8w8(inputs: Inputs) -> Prepared:
    version = _need("gemlite")
    from gemlite.helper import A8W8_INT8_dynamic

    layer = A8W8_INT8_dynamic(device=str(inputs.device), dtype=DTYPE).from_linear(inputs.linear(), del_orig=False)
    return _prepared(inputs, layer, 8, version, OPERANDS_8_BIT)


def _gemlite_a16w4(inputs: Inputs) -> Prepared:
    version = _need("gemlite")
    from gemlite.helper import A16W4_HQQ_INT

    if inputs.case.in_features % GROUP:
        raise Unavailable(f"K is not a multiple of {GROUP}")
    # HQQ's form: (code - zero point) * scale, min to max of each group.
    groups = inputs.weight.to(torch.float32).reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / CODE4_MAX
    zero_point = -low / scale
    codes = (groups / scale + zero_point).round().clamp(0, CODE4_MAX).to(torch.uint8).reshape(inputs.weight.shape)
    layer = A16W4_HQQ_INT(device=str(inputs.device), dtype=DTYPE).from_weights(
        codes, scale.to(DTYPE), zero_point.to(DTYPE), bias=inputs.bias
    )
    return _prepared(inputs, layer, 4, version, WEIGHTS_4_BIT)


def _humming(weight: dict[str, Any], activation: dict[str, Any] | None, inputs: Inputs) -> Prepared:
    version = _need("humming-kernels")
    from humming.layer import HummingLayer

    bits = 8 if weight["dtype"] == "int8" else 4
    layer = HummingLayer(
        shape_n=inputs.case.out_features,
        shape_k=inputs.case.in_features,
        weight_config=dict(weight),
        input_config=None if activation is None else dict(activation),
        torch_dtype=DTYPE,
    ).to(inputs.device)
    layer.load_from_unquantized(inputs.weight)
    layer.transform()
    allowed = OPERANDS_8_BIT if bits == 8 else WEIGHTS_4_BIT
    return _prepared(inputs, layer, bits, version, allowed, bias=False)


INT4_GROUPS = {"dtype": "int4", "group_size": GROUP}
PEERS = (
    Contender("torchao w8a8 dynamic", functools.partial(_torchao, 8), "peers"),
    Contender("torchao w4a16_g128", functools.partial(_torchao, 4), "peers"),
    Contender("gemlite w8a8 dynamic", _gemlite_a8w8, "peers"),
    Contender("gemlite w4a16_g128", _gemlite_a16w4, "peers"),
    Contender("humming w8a8", functools.partial(_humming, {"dtype": "int8"}, {"dtype": "int8"}), "peers"),
    Contender("humming w4a8_g128", functools.partial(_humming, INT4_GROUPS, {"dtype": "int8"}), "peers"),
    Contender("humming w4a16_g128", functools.partial(_humming, INT4_GROUPS, None), "peers"),
)
