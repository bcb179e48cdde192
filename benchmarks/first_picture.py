"""How many Triton kernels are compiled on the way to a model's first picture, and how many more at another resolution,
counted on a machine without a GPU.

    python benchmarks/first_picture.py
    python benchmarks/first_picture.py --arch 80

A driver of Triton's stands in place of a GPU's: the products and quantizations of a model's layers ask for their
kernels, which are written down and neither compiled nor launched. Without the CUDA extension, and with the
configurations that the heuristic chooses.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton

from ditq_kernels.inspect.bounds import GPUS
from ditq_kernels.inspect.cases.inputs import stored
from ditq_kernels.inspect.counted import MODELS
from ditq_kernels.inspect.executor import driver
from ditq_kernels.kernels import activation, dispatch
from ditq_kernels.kernels.config import shared_memory
from ditq_kernels.kernels.device import Device, standing_in
from ditq_kernels.layer.formats import SCHEMES
from ditq_kernels.shapes import LAYERS

LESS = 9 / 16  # of the tokens: pictures of three quarters of the width and height


def call_layers(model: str, scheme: str, share: float) -> None:
    """Each layer once, as the scheme computes it; its modulation with 16-bit activations."""
    for layer in LAYERS:
        if layer.model != model:
            continue
        for rows in layer.rows:
            weight, bias = stored(SCHEMES[scheme].weight, layer.out_features, layer.in_features)
            bias = bias.to(torch.bfloat16)
            x = torch.empty((rows if layer.modulation else int(rows * share), layer.in_features), dtype=torch.bfloat16)
            if layer.modulation:
                dispatch.linear_a16(x, weight, bias)
            else:
                qx, sx = activation.quantize_activation(x)
                dispatch.linear_a8(qx, sx, weight, bias, x.dtype)
        stored.cache_clear()


def asked_for(arch: int, scheme: str) -> Iterator[tuple[str, collections.Counter, collections.Counter]]:
    """(model, kernels of its first picture by name, more of them at another resolution)."""
    for model in MODELS:
        seen: dict[tuple[str, str], str] = {}

        def note(*, fn, key, seen=seen, **_) -> bool:
            seen.setdefault((fn.jit_function.cache_key, str(key)), fn.name)
            return True  # do not compile

        triton.knobs.runtime.jit_cache_hook = note
        call_layers(model, scheme, 1.0)
        first = collections.Counter(seen.values())
        call_layers(model, scheme, LESS)
        yield model, first, collections.Counter(seen.values()) - first


def said(kernels: collections.Counter) -> str:
    parts = ", ".join(f"{count} {name.rsplit('.', 1)[-1].removesuffix('_kernel')}" for name, count in kernels.items())
    return f"{kernels.total()} ({parts})" if kernels else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(GPUS), help="(default: %(default)s)")
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8_g128"], choices=sorted(SCHEMES))
    args = parser.parse_args()
    driver.install(driver.Session(args.arch, shared_memory(args.arch)), tempfile.gettempdir())
    print("| scheme | model | first picture | more at three quarters of its sides |\n|---|---|---|---|")
    with standing_in(Device("counted", args.arch, GPUS[args.arch].multiprocessors)):
        for scheme in args.schemes:
            for model, first, more in asked_for(args.arch, scheme):
                print(f"| {scheme} | {model} | {said(first)} | {said(more)} |", flush=True)


if __name__ == "__main__":
    main()
