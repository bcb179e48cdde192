"""``ditq inspect`` on the command line. Imports at once only what its help needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import arguments
from ..arguments import AddCommand


def _inspect(args: argparse.Namespace) -> int:
    if args.step:
        return _step(args)
    if args.scheme:
        raise ValueError("--scheme says how the model of --step is quantized: add --step MODEL")
    if args.execute:
        if args.driver:
            raise ValueError("--driver loads kernels on a GPU and --execute computes without one; choose one of them")
        if args.counters and args.quick:
            raise ValueError("--quick chooses among the cases that are judged; --match chooses what --counters counts")
        if args.counters:
            return count_kernels(args.arch, match=args.match, out=args.out, as_json=args.json)
        return execute_kernels(args.arch, quick=args.quick, match=args.match, out=args.out, as_json=args.json)
    if args.match or args.out or args.counters:
        raise ValueError("--match, --out and --counters say what to execute: add --execute")
    return inspect_kernels(args.arch, driver=args.driver, quick=args.quick, as_json=args.json)


DEFAULT_SCHEME, DEFAULT_ARCHITECTURE = "w8a8", 90


def _step(args: argparse.Namespace) -> int:
    if args.execute or args.driver or args.quick or args.match or args.counters:
        raise ValueError("--step traces a model, and goes with --scheme, --arch, --json and --out only")
    architectures = args.arch or [DEFAULT_ARCHITECTURE]
    if len(architectures) > 1:
        raise ValueError("--step traces for one GPU at a time: give --arch one architecture")
    return trace_step(args.step, args.scheme or DEFAULT_SCHEME, architectures[0], out=args.out, as_json=args.json)


def trace_step(
    name: str,
    scheme: str = DEFAULT_SCHEME,
    arch: int = DEFAULT_ARCHITECTURE,
    *,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Trace a step of a published model in 16 bits, in ``scheme`` and fused, eager and compiled, for a GPU that need
    not be there, and print what its blocks launch, move and multiply; the exit code, 1 where a
    form could not be traced.

    Args:
        name: a key of :data:`ditq_kernels.published.MODELS`, or how one begins.
        out: a JSON file to write all kernels to, with versions and commit.
        as_json: print that in place of the table.

    Raises:
        ValueError: for an unknown model or scheme, an architecture without published rates, or if there is no folder
            for ``out``.
    """
    import json

    from ..layer.formats import Scheme
    from ..progress import track
    from ..published import MODELS
    from .bounds import GPUS

    meant = [name] if name in MODELS else [one for one in MODELS if one.startswith(name)]
    if len(meant) != 1:
        what = f"{name!r} could be {' or '.join(meant)}" if meant else f"unknown model {name!r}"
        raise ValueError(f"{what}; --step takes {', '.join(MODELS)}")
    (name,) = meant
    if arch not in GPUS:
        raise ValueError(
            f"no rates are kept of a GPU of sm_{arch}; --arch takes {', '.join(f'sm_{one}' for one in GPUS)}"
        )
    Scheme.parse(scheme)
    _check_folder_of(out)
    from .step import report

    steps, missing = {}, {}
    for form, step in track(report.traced(name, scheme, arch), len(report.forms(scheme)), "form"):
        (missing if isinstance(step, str) else steps)[form] = step
    record = report.record(name, scheme, arch, steps)
    _keep(record, out)
    if as_json:
        print(json.dumps(record, indent=1))
        return 1 if missing else 0
    print(
        f"{MODELS[name].about}; {GPUS[arch].name} (sm_{arch}), which was not asked: all is counted, no time is measured"
    )
    print(f"{record['weights']}\n")
    print(report.table(name, {form: report.totals(name, step, arch) for form, step in steps.items()}))
    print(f"\n{report.LEGEND}")
    for form, reason in missing.items():
        print(f"not traced: {form.name}: {reason}")
    return 1 if missing else 0


def execute_kernels(
    asked: Sequence[int] | None = None,
    *,
    quick: bool = False,
    match: str = "",
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Execute every kernel for the architectures ``asked`` for (default: all that can be), and print each verdict; the
    exit code.

    Args:
        quick: take the choice that runs in a few minutes.
        match: part of the names of the cases to take.
        out: a JSON file to write the outcomes to, with versions and commit.
        as_json: print a list of objects, one a case, in place of lines.

    Raises:
        ValueError: for an architecture that cannot be executed, if there is no case or none matches, or if there is no
            folder for ``out``.
    """
    import json

    from ..progress import track
    from . import execution

    architectures = asked or (execution.QUICK_ARCHITECTURES if quick else execution.ARCHITECTURES)
    for arch in set(architectures) - set(execution.ARCHITECTURES):
        known = ", ".join(f"sm_{known}" for known in execution.ARCHITECTURES)
        raise ValueError(f"sm_{arch} cannot be executed: another of its family stands for it; --arch takes {known}")
    _check_folder_of(out)
    count = execution.count(architectures, quick, match)
    if not count and match:
        raise ValueError(f"no case's name holds {match!r}; without --match all are executed")
    if not count:
        raise ValueError(f"nothing can be executed: {'; '.join(execution.left_out(architectures))}")
    outcomes = []
    for outcome in track(execution.execute(architectures, quick, match), count, "case"):
        outcomes.append(outcome)
        if not as_json:
            print(execution.line(outcome), flush=True)
    record = execution.record(outcomes)
    _keep(record, out)
    lines = [*execution.summary(outcomes), *execution.left_out(architectures)]
    print(json.dumps(record, indent=1) if as_json else "\n".join(lines))
    return 0 if all(outcome.verdict == execution.OK for outcome in outcomes) else 1


def count_kernels(
    asked: Sequence[int] | None = None, *, match: str = "", out: Path | None = None, as_json: bool = False
) -> int:
    """Count what the kernels of real layers ask of the memories on the architectures ``asked`` for (default: all that
    are counted), and print a table; the exit code.

    Args:
        match: part of the names of the products, or of the layers that they are of.
        out: a JSON file to write the counts to, with versions and commit.
        as_json: print that in place of the table.

    Raises:
        ValueError: for an architecture that is not counted, if nothing matches, or if there is no folder for ``out``.
    """
    import json

    from ..progress import track
    from . import counted, counting

    architectures = tuple(dict.fromkeys(asked or counting.ARCHITECTURES))
    counting.check(architectures)
    _check_folder_of(out)
    subjects = counted.chosen(match)
    if not subjects:
        raise ValueError(f"no product and no layer holds {match!r} in its name; without --match all are counted")
    counts = []
    if not as_json:
        print(counting.HEADER)
    total = sum(subject.is_for(arch) for arch in architectures for subject in subjects)
    for found in track(counting.count(architectures, subjects), total, "product"):
        counts += found
        if not as_json:
            print("\n".join(counting.lines(found)), flush=True)
    record = counting.record(counts)
    _keep(record, out)
    if as_json:
        print(json.dumps(record, indent=1))
    return 0


def _check_folder_of(out: Path | None) -> None:
    # Said now, and not when hours have passed.
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.absolute().parent}")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: it is a folder")


def _keep(record: dict, out: Path | None) -> None:
    import json

    from ..files import written_whole

    if out is not None:
        with written_whole(out) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n")


def inspect_kernels(
    asked: Sequence[int] | None = None, *, driver: bool = False, quick: bool = False, as_json: bool = False
) -> int:
    """Inspect every kernel for the architectures ``asked`` for (default: all), and print what is found; the exit code.

    Args:
        driver: load each kernel on this machine's GPU as well.
        quick: inspect an eighth of the forms of a family of architectures.
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
        architectures = [_loadable_architecture(asked, inspection.ARCHITECTURES + inspection.RELATIVES)]
    findings = []
    if not as_json:
        print(inspection.HEADER)
    inspected = inspection.inspect(architectures, driver=driver, quick=quick)
    for finding in track(inspected, inspection.count(architectures, quick), "kernel"):
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
        "compile every kernel for each GPU architecture, with no GPU, and check its machine code, or execute it; or "
        "trace a step of a published model",
        "  ditq inspect --arch sm_90\n  ditq inspect --json > machine-code.json\n"
        '  ditq inspect --execute --quick\n  ditq inspect --execute --arch sm_90 --match "small w4_g128"\n'
        '  ditq inspect --execute --counters --arch sm_90 --match "FLUX.1"\n'
        "  ditq inspect --step flux.1-dev-1024 --scheme w4a8_g128",
        device=False,
    )
    inspect.add_argument(
        "--arch",
        type=arguments.architecture,
        nargs="+",
        help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (default: these), sm_103, sm_121",
    )
    inspect.add_argument(
        "--driver", action="store_true", help="load each kernel on this machine's GPU too; its driver must agree"
    )
    inspect.add_argument(
        "--json",
        action="store_true",
        help="in place of the table: a list of objects, one a kernel; with --execute or --step what --out writes",
    )
    inspect.add_argument(
        "--execute",
        action="store_true",
        help="compute with every kernel, from its compiled PTX on this CPU, and compare with the reference (an hour)",
    )
    inspect.add_argument(
        "--counters",
        action="store_true",
        help="with --execute: count what the kernels of DiT-XL/2's, PixArt's and FLUX's layers ask of the memories, in "
        "place of judging what they compute",
    )
    inspect.add_argument(
        "--step",
        metavar="MODEL",
        help="trace a step of a published model: launches, bytes, multiply-accumulates and a bound of each block, in "
        "16 bits and quantized, fused, compiled (two minutes); MODEL is a name or how it begins: "
        "flux.1, sd3.5, pixart, wan2.1-14b ... (a wrong one lists them)",
    )
    inspect.add_argument(
        "--scheme", help=f"with --step: how it is quantized, w8a8, w4a8_g128 ... (default: {DEFAULT_SCHEME})"
    )
    inspect.add_argument("--quick", action="store_true", help="a choice of the kernels, which takes minutes")
    inspect.add_argument(
        "--match", default="", metavar="TEXT", help="with --execute: cases, or layers, whose name holds TEXT"
    )
    inspect.add_argument(
        "--out", type=Path, metavar="FILE", help="with --execute or --step: JSON of all outcomes, counts or kernels"
    )
