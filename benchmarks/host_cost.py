"""Microseconds of Python that a call of a quantized layer takes from the call to its last launch, beside PyTorch's own
linear layer, on a machine without a GPU.

    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --arch 80 --schemes w8a8

A driver of Triton's stands in place of a GPU's: kernels are compiled to PTX once, and a launch ends where the launcher
would be called. Of PyTorch's layer, a matrix product of one by one. Medians of rounds that take turns; no gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from ditq_kernels import QuantLinear, use_backend
from ditq_kernels.inspect.bounds import GPUS
from ditq_kernels.inspect.executor import driver
from ditq_kernels.kernels.config import shared_memory
from ditq_kernels.kernels.device import Device, standing_in
from ditq_kernels.layer import backend, tape

SHAPES = ((512, 1152, 1152), (4096, 3072, 3072))  # (M, N, K)


class NothingLaunched(driver.Launcher):
    def __call__(self, *_) -> None:
        pass


def microseconds(call: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(GPUS), help="(default: %(default)s)")
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w8a8_static", "w4a8_g128"])
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="of each in a round (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    driver.Launcher = NothingLaunched
    with (
        tempfile.TemporaryDirectory() as cache,
        standing_in(Device("counted", args.arch, GPUS[args.arch].multiprocessors)),
        torch.no_grad(),
    ):
        driver.install(driver.Session(args.arch, shared_memory(args.arch)), cache)
        backend.why_unavailable = lambda name, device_type: None
        tape.DEVICES.add("cpu")
        found: dict[str, list[float]] = {}
        calls: dict[str, Callable[[], object]] = {}
        for rows, out_features, in_features in SHAPES:
            linear = nn.Linear(in_features, out_features, dtype=torch.bfloat16)
            x = torch.zeros(rows, in_features, dtype=torch.bfloat16)
            for scheme in args.schemes:
                layer = QuantLinear.from_linear(linear, scheme, 1.0 if scheme.endswith("static") else None)
                calls[f"{rows} x {out_features} x {in_features} {scheme}"] = lambda layer=layer, x=x: layer(x)
        small, one = nn.Linear(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.bfloat16)
        calls["torch.nn.Linear"] = lambda: small(one)
        with use_backend("triton"):
            for turn in range(args.rounds + 1):
                for name, call in calls.items():
                    took = microseconds(call, args.calls if turn else 3)
                    found.setdefault(name, []).extend([took] if turn else [])
    print("| call | µs (quartiles) |\n|---|---|")
    for name, values in found.items():
        lower, median, upper = statistics.quantiles(values, n=4)
        print(f"| {name} | {median:.0f} ({lower:.0f} to {upper:.0f}) |")


if __name__ == "__main__":
    main()
