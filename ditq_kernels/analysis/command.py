"""``ditq analyze`` on the command line. Imports at once only what its help needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .. import arguments
from ..arguments import AddCommand
from ..model.calibration import DEFAULT_STEP

TRIAL_STEPS = 10
SEED_STRIDE = 7919  # a prime: classes of consecutive pictures lie far apart


def _analyze(args: argparse.Namespace) -> int:
    from .. import __version__
    from ..integrations.sampling import default_scheduler, sample
    from ..integrations.source import load_source
    from .analyze import analyze
    from .report import check_target, findings, plan_text, write

    device = arguments.device(args.device)
    check_target(args.out)
    source = load_source(args.source, device=device)
    name = type(source.transformer).__name__
    if name != "DiTTransformer2DModel":
        raise ValueError(
            f"this command can sample only DiTTransformer2DModel, and {args.source} holds a {name}; analyze it in "
            "Python with ditq_kernels.analysis.analyze.analyze"
        )
    if device == "cpu":
        source.transformer.float()  # a CPU takes three times as long in 16 bits
    classes = source.transformer.config.num_embeds_ada_norm
    labels = [(args.seed + i * SEED_STRIDE) % classes for i in range(args.samples)]
    seeds = [args.seed + i for i in range(args.samples)]
    scheduler = source.scheduler or default_scheduler()

    def drawing(steps: int) -> Callable:
        return lambda: sample(
            source.transformer, scheduler, labels, seeds, steps=steps, guidance=args.guidance, progress=False
        )

    analysis = analyze(
        source.transformer,
        drawing(args.steps),
        args.schemes,
        step=args.step,
        trial=drawing(min(args.trial_steps, args.steps)),
        one_by_one=not args.no_trials,
    )
    about = dict(
        source=str(args.source),
        pictures=args.samples,
        steps=args.steps,
        trial_steps=None if args.no_trials else min(args.trial_steps, args.steps),
        guidance=args.guidance,
        seed=args.seed,
        ditq_kernels=__version__,
    )
    write(analysis, about, args.out)
    print("\n".join(findings(analysis)))
    print(f"\nrecommended for {analysis.plan.scheme}: {plan_text(analysis)}")
    for layer in analysis.exceptions:
        entry = analysis.plan[layer]
        print(f"  {layer}: {entry.scheme or '16 bits'}: {entry.reason}")
    print(f"\npage: {args.out / 'report.html'}   numbers: {args.out / 'report.json'}")
    return 0


def add_commands(command: AddCommand) -> None:
    """Add the command by ``command(name, run, help, examples)``."""
    analyze = command(
        "analyze",
        _analyze,
        "show what makes a model hard to quantize: a page with pictures, numbers, and a recommended plan",
        "  ditq analyze ./DiT-XL-2-256 --out ./analysis\n"
        "  ditq analyze ./DiT-XL-2-256 --schemes w8a8 w4a16_g64 --no-trials --out ./quick",
    )
    analyze.add_argument("source", metavar="SRC", help="directory of a model or pipeline, or a hub name (owner/name)")
    analyze.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    analyze.add_argument(
        "--schemes",
        nargs="+",
        metavar="SCHEME",
        default=["w8a8", "w8a8_static", "w4a8_g128"],
        help="to try each layer in; the plan is made for the last (default: w8a8 w8a8_static w4a8_g128)",
    )
    analyze.add_argument(
        "--steps", type=arguments.count, default=50, help="steps of the observed run (default: %(default)s)"
    )
    analyze.add_argument(
        "--step",
        type=arguments.fraction,
        default=DEFAULT_STEP,
        help="where static scales are taken from (default: %(default)s)",
    )
    analyze.add_argument("--samples", type=arguments.count, default=4, help="pictures in a run (default: %(default)s)")
    analyze.add_argument(
        "--trial-steps",
        type=arguments.count,
        default=TRIAL_STEPS,
        help="steps of each run with one layer quantized (default: %(default)s)",
    )
    analyze.add_argument("--no-trials", action="store_true", help="leave those runs out; the plan has no exceptions")
    analyze.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default: %(default)s)")
    analyze.add_argument("--seed", type=arguments.seed, default=0, help="of the runs (default: %(default)s)")
