"""``ditq demo`` on the command line. Imports at once only what its help needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import arguments
from ..arguments import AddCommand


def _demo(args: argparse.Namespace) -> int:
    from .report import check_output, table, write_report
    from .run import Settings, run_demo

    settings = Settings(seeds=args.samples_per_class, steps=args.steps, device=arguments.device(args.device))
    check_output(args.out)
    results, calibration = run_demo(settings)
    write_report(results, calibration, settings, args.out)
    print(table(results))
    print(
        f"pictures: {args.out / 'samples.png'}   page: {args.out / 'report.md'}   numbers: {args.out / 'report.json'}"
    )
    return 0


def add_commands(command: AddCommand) -> None:
    """Add the command by ``command(name, run, help, examples)``."""
    demo = command(
        "demo",
        _demo,
        "quantize the embedded model by every scheme and compare the pictures",
        "  ditq demo --out out/demo\n  ditq demo --steps 10 --samples-per-class 1 --out /tmp/quick",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="directory for the report (default: %(default)s)"
    )
    demo.add_argument("--steps", type=arguments.count, default=50, help="sampling steps (default: %(default)s)")
    demo.add_argument(
        "--samples-per-class", type=arguments.count, default=1, help="pictures per class (default: %(default)s)"
    )
