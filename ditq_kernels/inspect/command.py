"""``ditq inspect`` on the command line. Imports at once only what its help needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import arguments
from ..arguments import AddCommand


def _inspect(args: argparse.Namespace) -> int:
    return inspect_kernels(args.arch, driver=args.driver, as_json=args.json)


def inspect_kernels(asked: Sequence[int] | None = None, *, driver: bool = False, as_json: bool = False) -> int:
    """Inspect every kernel for the architectures ``asked`` for (default: all), and print what is found; the exit code.

    Args:
        driver: load each kernel on this machine's GPU as well.
        as_json: print a list of objects, one a kernel, in place of lines.

    Raises:
        ValueError: if ``driver`` is asked for without a GPU, or for another architecture than the GPU's.
    """
    import dataclasses
    import json

    from ..progress import track
    from . import inspection

    architectures = asked or inspection.ARCHITECTURES
    if driver:
        architectures = [_loadable_architecture(asked, inspection.ARCHITECTURES)]
    findings = []
    if not as_json:
        print(inspection.HEADER)
    inspected = inspection.inspect(architectures, driver=driver)
    for finding in track(inspected, inspection.count(architectures), "kernel"):
        findings.append(finding)
        if not as_json:
            print(inspection.line(finding), flush=True)
    failed = sum(bool(finding.failures) for finding in findings)
    if as_json:
        rows = [{**dataclasses.asdict(finding.code), "failures": finding.failures} for finding in findings]
        print(json.dumps(rows, indent=1))
    else:
        print(f"{failed} of {len(findings)} kernels fail" if failed else f"all {len(findings)} kernels pass")
    return 1 if failed else 0


def _loadable_architecture(asked: Sequence[int] | None, known: Sequence[int]) -> int:
    """The GPU's, which is the one that its driver loads kernels for."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--driver needs a CUDA GPU, and torch sees none; without it, kernels are compiled and read")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    if arch not in known or (asked and list(asked) != [arch]):
        raise ValueError(f"--driver loads kernels of this GPU's architecture, sm_{arch}, only; leave it out for others")
    return arch


def add_commands(command: AddCommand) -> None:
    """Add the command by ``command(name, run, help, examples)``."""
    inspect = command(
        "inspect",
        _inspect,
        "compile every kernel for each GPU architecture, with no GPU, and check its machine code",
        "  ditq inspect --arch sm_90\n  ditq inspect --json > machine-code.json",
        device=False,
    )
    inspect.add_argument(
        "--arch",
        type=arguments.architecture,
        nargs="+",
        help="sm_80, sm_89, sm_90, sm_100, sm_120 (default: all)",
    )
    inspect.add_argument(
        "--driver", action="store_true", help="load each kernel on this machine's GPU too; its driver must agree"
    )
    inspect.add_argument("--json", action="store_true", help="a list of objects, one a kernel")
