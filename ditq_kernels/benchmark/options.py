"""``ditq bench`` and ``ditq tune`` on the command line: their options, and what they do where there is no GPU. Imports
nothing heavy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import arguments
from ..arguments import AddCommand

NOTHING_TO_MEASURE = (
    "no CUDA GPU to measure: kernels for GPUs run on the CPU only to be tested, and are not timed there"
)


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="only layers of models whose names begin so (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the shapes that targets are set for; on a CPU, eager, in few rounds"
    )
    parser.add_argument(
        "--seconds", type=arguments.seconds, default=600.0, help="time to start new cases in (default: %(default).0f)"
    )


def _gpu(name: str) -> Any:
    """The CUDA device called ``name``; None of a CPU, with a line that says so."""
    import torch

    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # graphs are captured on the current one
        return device
    print(NOTHING_TO_MEASURE)
    return None


def _bench(args: argparse.Namespace) -> int:
    if args.quantizing:
        from .command import bench_quantizing

        return bench_quantizing(args.out)
    if args.steps:
        import torch

        from .command import bench_steps

        device = torch.device(arguments.device(args.device))
        return bench_steps(args.out, device, args.models, args.schemes, args.blocks)
    if args.blocks:
        raise ValueError("--blocks says how deep the models of --steps are: add --steps")
    device = _gpu(arguments.device(args.device))
    if device is None:
        if args.models or args.schemes or args.rows:
            raise ValueError(
                "--models, --schemes and --rows choose layers that are measured on a GPU; leave them out on a CPU, or "
                "add --steps for whole models"
            )
        from .command import bench_cpu

        print("instead, blocks of models are timed on this CPU; what kernels for GPUs compile to, says `ditq inspect`")
        return bench_cpu(args.out, args.quick)
    from .command import BenchSettings, bench

    settings = BenchSettings(args.out, args.models, args.schemes, args.rows, args.quick, args.seconds)
    return 1 if bench(settings, device).lost else 0


def _tune(args: argparse.Namespace) -> int:
    device = _gpu(arguments.device(args.device))
    if device is None:
        return 0
    from .command import tune

    return tune(args.models, args.seconds, args.out, device, args.quick)


def add_commands(command: AddCommand) -> None:
    """Add both commands by ``command(name, run, help, examples)``."""
    bench = command(
        "bench",
        _bench,
        "measure the kernels beside cuBLAS and other projects' on real layers; on a CPU, blocks of models",
        "  ditq bench --quick --out out/bench\n"
        "  ditq bench --models FLUX.1 DiT-XL/2 --schemes w8a8 w4a8_g128 --rows 512 4096 --seconds 300\n"
        "  ditq bench --device cpu --out out/bench\n"
        "  ditq bench --quantizing --out out/bench\n"
        "  ditq bench --steps --models flux.1 dit-xl-2-512 --schemes w8a8 --out out/bench",
    )
    _selection(bench)
    bench.add_argument(
        "--quantizing",
        action="store_true",
        help="measure, on the CPU, how fast weights are quantized, beside the other libraries that are installed",
    )
    bench.add_argument(
        "--steps",
        action="store_true",
        help="measure whole steps of published models with random weights: eager, compiled and as CUDA graphs",
    )
    bench.add_argument(
        "--blocks", type=arguments.count, metavar="N", help="with --steps: build N blocks of each kind (default: all)"
    )
    bench.add_argument("--schemes", nargs="+", metavar="SCHEME", help="of ours, only these (default: the recommended)")
    bench.add_argument(
        "--rows", type=arguments.count, nargs="+", metavar="M", help="only cases with these numbers of rows"
    )
    bench.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="directory for JSON and pictures (default: %(default)s)"
    )
    tune = command(
        "tune",
        _tune,
        "time every configuration of the kernels on this GPU, and write the table of winners that they will use",
        "  ditq tune --seconds 900\n  ditq tune --models FLUX.1 --out ./tables",
    )
    _selection(tune)
    tune.add_argument("--out", type=Path, help="directory of tables (default: $DITQ_TABLES, else the user's cache)")
