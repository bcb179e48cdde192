"""Other libraries' quantizers on the same layers, pictures and seeds; they come with ``ditq_kernels[peers]``.

Each converts one linear layer at a time. Of those that quantize weights alone, the weights are read back and multiplied
in floating point, so that nothing else differs; the others run as their library runs them. Bits are counted as the
format stores them in a 16-bit model, packed: 16 for a scale, even where the library keeps 32, or a byte for each code.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from torch import nn

from ...model.calibration import DEFAULT_STEP
from ...model.conversion import quantize, replace_module
from ...model.planning import plan
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol()


@dataclass(frozen=True)
class Peer:
    """One setting of another library.

    Attributes:
        package: as pip knows it; module: as Python does.
        method: the setting, in words.
        convert: a copy of a linear layer to what the library makes of it.
        bits: stored bits per weight, of a layer with K inputs.
        runs: whether its activations are quantized, too, so that the layer itself has to run.
    """

    package: str
    module: str
    method: str
    convert: Callable[[nn.Linear], nn.Module]
    bits: Callable[[int], float]
    runs: bool = False


def _torchao(layer: nn.Linear, make_config: Callable[[], object]) -> nn.Module:
    from torchao.quantization import quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, make_config())
    return holder[0]


def _torchao_int4(group: int, mapping: str, algorithm: str) -> object:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    return IntxWeightOnlyConfig(
        torch.int4,
        PerGroup(group),
        MappingType[mapping],
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )


def _torchao_int8() -> object:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _quanto(layer: nn.Linear, weights: str, hqq: bool = False) -> nn.Module:
    from optimum import quanto

    holder = nn.Sequential(layer)
    chosen = dict(optimizer=quanto.HqqOptimizer()) if hqq else {}
    quanto.quantize(holder, weights=getattr(quanto, weights), **chosen)
    quanto.freeze(holder)
    return holder[0]


def _sdnq(layer: nn.Linear, **settings: object) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(nn.Sequential(layer), add_skip_keys=False, **settings)[0]


def _bitsandbytes(layer: nn.Linear, kind: str, block: int) -> nn.Module:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        layer.weight.data, blocksize=block, quant_type=kind, compress_statistics=True
    )
    layer.weight = nn.Parameter(functional.dequantize_4bit(codes, state).reshape(layer.weight.shape), False)
    return layer


def _peers() -> Iterator[Peer]:
    torchao = partial(Peer, "torchao", "torchao")
    for group in (128, 64):
        for mapping, algorithm, zero in (
            ("SYMMETRIC", "AFFINE", 0),
            ("ASYMMETRIC", "AFFINE", 8),
            ("SYMMETRIC", "HQQ_SCALE_ONLY", 0),
        ):
            yield torchao(
                f"int4 weights, groups of {group}, {mapping.lower()}{', HQQ' if 'HQQ' in algorithm else ''}",
                partial(_torchao, make_config=partial(_torchao_int4, group, mapping, algorithm)),
                lambda k, group=group, zero=zero: 4 + (16 + zero) / group,
            )
    yield torchao(
        "int8, activations per token", partial(_torchao, make_config=_torchao_int8), lambda k: 8 + 16 / k, runs=True
    )
    quanto = partial(Peer, "optimum-quanto", "optimum.quanto")
    yield quanto("qint4 weights", partial(_quanto, weights="qint4"), lambda k: 4 + 32 / 128)
    yield quanto("qint4 weights, HQQ", partial(_quanto, weights="qint4", hqq=True), lambda k: 4 + 32 / 128)
    yield quanto("qint8 weights", partial(_quanto, weights="qint8"), lambda k: 8 + 16 / k)
    sdnq = partial(Peer, "sdnq", "sdnq")
    for group in (128, 64):
        for dtype, zero in (("int4", 0), ("uint4", 16)):
            yield sdnq(
                f"{dtype} weights, groups of {group}",
                partial(_sdnq, weights_dtype=dtype, group_size=group),
                lambda k, group=group, zero=zero: 4 + (16 + zero) / group,
            )
    yield sdnq(
        "uint4 weights, groups of 64, Hadamard",
        partial(_sdnq, weights_dtype="uint4", group_size=64, use_hadamard=True),
        lambda k: 4 + 32 / 64,
    )
    yield sdnq(
        "int8, activations per token",
        partial(_sdnq, weights_dtype="int8", use_quantized_matmul=True),
        lambda k: 8 + 16 / k,
        runs=True,
    )
    bitsandbytes = partial(Peer, "bitsandbytes", "bitsandbytes")
    for kind in ("nf4", "fp4"):
        yield bitsandbytes(
            f"{kind} weights, blocks of 64, double quantization",
            partial(_bitsandbytes, kind=kind, block=64),
            lambda k: 4 + 8 / 64 + 32 / (64 * 256),
        )


def _read_weight(layer: nn.Module, in_features: int) -> torch.Tensor:
    """[N, K]: what ``layer``, linear but for its bias, multiplies by."""
    with torch.no_grad():
        return (layer(torch.eye(in_features)) - layer(torch.zeros(1, in_features))).T.contiguous()


def cases(lab: Lab) -> Iterator[Case]:
    """Every peer, and ours beside them.

    Raises:
        ModuleNotFoundError: if one of the packages is missing.
    """
    shapes = [(layer.out_features, layer.in_features) for layer in lab.layers.values()]
    total = sum(n * k for n, k in shapes)

    def ours(scheme: str, rounding: str, everywhere: bool = False) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(DEFAULT_STEP, moments=True)
            chosen = plan(lab.model, scheme)
            if everywhere:
                for entry in chosen.quantized():
                    chosen[entry.name] = scheme
            return quantize(lab.copy(), chosen, calibration, rounding=rounding, progress=False)

        method = f"{scheme}, {rounding}{', modulation too' if everywhere else ''}"
        return Case(dict(package="ditq_kernels", method=method), build)

    def theirs(peer: Peer) -> Case:
        def build() -> nn.Module:
            model = lab.copy()
            for name in lab.layers:
                layer = model.get_submodule(name)
                converted = peer.convert(copy.deepcopy(layer))
                if peer.runs:
                    replace_module(model, layer, converted)
                else:
                    layer.weight = nn.Parameter(_read_weight(converted, layer.in_features), requires_grad=False)
            return model

        facts = dict(
            package=peer.package,
            version=version(peer.package),
            method=peer.method,
            bits_per_weight=sum(peer.bits(k) * n * k for n, k in shapes) / total,
        )
        return Case(facts, build, noise=not peer.runs)

    for scheme in ("w4a16_g128", "w4a16_g64", "w4a16_g32"):
        for rounding in ("nearest", "compensated"):
            yield ours(scheme, rounding)
    yield ours("w8a8", "nearest")
    yield ours("w8a8", "nearest", everywhere=True)
    yield ours("w8a16", "nearest")
    for peer in _peers():
        importlib.import_module(peer.module)
        yield theirs(peer)
