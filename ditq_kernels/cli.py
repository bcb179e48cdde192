"""``ditq``: quantize, generate, demo, analyze, evaluate, bench, tune, inspect, env. What only some commands need is
imported by them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .analysis import command as analysis_command
from .benchmark import options as benchmark_options
from .calibration import ALL_STEPS, DEFAULT_PICTURES, DEFAULT_STEP
from .evaluation import command as evaluation_command

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# What a user can mend; anything else is a defect of ours and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError)


def _say_error(error: BaseException) -> None:
    message = " ".join(str(error).split())  # other libraries' messages come in several lines
    if isinstance(error, ModuleNotFoundError):
        message += "; pip install 'ditq_kernels[demo]' brings what the commands need"
    print(f"ditq: error: {message}", file=sys.stderr)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; --device takes cpu, cuda, cuda:1 ...")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA GPU(s)")
    return name


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another --out, or remove it")


def _calibrate(source, args: argparse.Namespace, scheme):
    """The calibration that ``args`` need, or None: static schemes and compensated rounding are the ones that need
    it.
    """
    if not scheme.static and args.rounding != "compensated":
        return None
    from .calibration import calibrate
    from .integrations.sampling import default_scheduler, sample

    config = source.transformer.config
    if type(source.transformer).__name__ != "DiTTransformer2DModel":
        raise ValueError(
            f"this command can sample only DiTTransformer2DModel, which calibration needs, and {args.source} holds a "
            f"{type(source.transformer).__name__}; calibrate it in Python with ditq.calibrate(model, run)"
        )
    labels = [(args.seed + i * 7919) % config.num_embeds_ada_norm for i in range(args.samples)]
    seeds = [args.seed + i for i in range(args.samples)]
    scheduler = source.scheduler or default_scheduler()

    def run() -> None:
        sample(source.transformer, scheduler, labels, seeds, steps=args.steps, guidance=args.guidance)

    return calibrate(source.transformer, run, args.step, moments=args.rounding == "compensated")


def quantize_command(args: argparse.Namespace) -> int:
    from .conversion import plan, quantize, quantized_layers
    from .formats import Scheme

    scheme = Scheme.parse(args.scheme)
    if not args.plan_only:
        if args.out is None:
            raise ValueError("--out is needed: the directory to write the quantized model to (or --plan-only)")
        _refuse_existing(args.out)
    from .integrations.diffusers import check_target, load_source, save_quantized

    source = load_source(args.source, device=_device(args.device))
    chosen = plan(source.transformer, scheme)
    print(chosen)
    if args.plan_only:
        return 0
    check_target(source, args.out)
    calibration = _calibrate(source, args, scheme)
    quantize(source.transformer, chosen, calibration, rounding=args.rounding, clip=args.clip)
    layers = quantized_layers(source.transformer).values()
    save_quantized(source, args.out)
    stored = sum(layer.nbytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    print(
        f"{args.out}: {len(layers)} layers quantized, {weights / 1e6:.1f} M weights in {stored / 1e6:.1f} MB "
        f"({8 * stored / weights:.2f} bits per weight; in 16 bits they take {2 * weights / 1e6:.1f} MB)"
    )
    return 0


def _class_index(name: str, labels: dict[str, int], classes: int) -> int:
    if name.isdigit():
        index = int(name)
        if index >= classes:
            raise ValueError(f"class {index} does not exist: this model's classes are 0 to {classes - 1}")
        return index
    if name in labels:
        return labels[name]
    known = f"names such as {', '.join(list(labels)[:10])}, or " if labels else ""
    raise ValueError(f"unknown class {name!r}; this model knows {known}indices 0 to {classes - 1}")


def generate_command(args: argparse.Namespace) -> int:
    from .integrations.diffusers import load_source
    from .integrations.sampling import default_scheduler, sample, save_grid

    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out} is a directory; name a PNG file")
    source = load_source(args.directory, device=_device(args.device), with_vae=True)
    config = source.transformer.config
    if type(source.transformer).__name__ != "DiTTransformer2DModel":
        raise ValueError(f"generate samples only DiTTransformer2DModel, and {args.directory} holds another model")
    source.check_decodable()
    labels = [_class_index(name, source.labels, config.num_embeds_ada_norm) for name in args.classes]
    pairs = [(label, seed) for seed in args.seed for label in labels]
    samples = sample(
        source.transformer,
        source.scheduler or default_scheduler(),
        [label for label, _ in pairs],
        [seed for _, seed in pairs],
        steps=args.steps,
        guidance=args.guidance,
    )
    save_grid(source.decode(samples), len(labels), args.out)
    print(f"{args.out}: {len(pairs)} pictures")
    return 0


def demo_command(args: argparse.Namespace) -> int:
    from .demo.report import check_output, table, write_report
    from .demo.run import Settings, run_demo

    settings = Settings(seeds=args.samples_per_class, steps=args.steps, device=_device(args.device))
    check_output(args.out)
    results, calibration = run_demo(settings)
    write_report(results, calibration, settings, args.out)
    print(table(results))
    print(
        f"pictures: {args.out / 'samples.png'}   page: {args.out / 'report.md'}   numbers: {args.out / 'report.json'}"
    )
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from .kernels import inspection
    from .progress import track

    if args.driver:
        args.arch = [_loadable_architecture(args.arch, inspection.ARCHITECTURES + inspection.RELATIVES)]
    architectures = args.arch or inspection.ARCHITECTURES
    findings = []
    if not args.json:
        print(inspection.HEADER)
    inspected = inspection.inspect(architectures, driver=args.driver)
    for finding in track(inspected, inspection.count(architectures), "kernel"):
        findings.append(finding)
        if not args.json:
            print(inspection.line(finding), flush=True)
    failed = sum(bool(finding.failures) for finding in findings)
    if args.json:
        rows = [{**dataclasses.asdict(finding.code), "failures": finding.failures} for finding in findings]
        print(json.dumps(rows, indent=1))
    else:
        print(f"{failed} of {len(findings)} kernels fail" if failed else f"all {len(findings)} kernels pass")
    return EXIT_FAILED if failed else 0


def _loadable_architecture(asked: list[int] | None, known: Sequence[int]) -> int:
    """The GPU's, which is the one that its driver loads kernels for."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--driver needs a CUDA GPU, and torch sees none; without it, kernels are compiled and read")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    if arch not in known or (asked and asked != [arch]):
        raise ValueError(f"--driver loads kernels of this GPU's architecture, sm_{arch}, only; leave it out for others")
    return arch


def env_command(args: argparse.Namespace) -> int:
    from .environment import describe

    print("\n".join(describe()))
    return 0


def _judge(model):
    """The embedded classifier for pictures that it knows."""
    from .demo.classifier import judge_of

    return judge_of(model)


def _inspect_instead() -> None:
    """What can be said of the kernels' speed without a GPU: what they compile to."""
    print("instead, all kernels are compiled for every architecture and their machine code is read; takes minutes")
    main(["inspect"])


def _sampling_options(parser: argparse.ArgumentParser, guidance: float) -> None:
    parser.add_argument("--steps", type=_count, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=guidance, help="guidance scale (default: %(default)s)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ditq",
        description="Diffusion transformers in 8 and 4 bits: calibrated from one sampling step, no training.",
        epilog="DITQ_BACKEND=reference|triton|cuda chooses the backend, DITQ_PRINT_CONFIG=1 shows the kernel that each "
        "product runs on, DITQ_DEBUG=1 shows tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, help: str, example: str, device: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"examples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        if device:
            sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
        return sub

    quantize = command(
        "quantize",
        quantize_command,
        "quantize a diffusers model or pipeline and save it",
        "  ditq quantize ./DiT-XL-2-256 --scheme w8a8 --out ./dit-w8a8\n"
        "  ditq quantize ./DiT-XL-2-256 --scheme w4a8_g128 --rounding compensated --out ./dit-w4a8\n"
        "  ditq quantize facebook/DiT-XL-2-256 --scheme w4a16_g128 --plan-only",
    )
    quantize.add_argument("source", metavar="SRC", help="directory of a model or pipeline, or a hub name (owner/name)")
    quantize.add_argument("--scheme", required=True, help="w8a8, w8a8_static, w4a8_g128, w4a16_g128 ...")
    quantize.add_argument("--out", type=Path, help="directory to write; must not exist")
    quantize.add_argument("--plan-only", action="store_true", help="print what would be done to each layer, and stop")
    quantize.add_argument(
        "--rounding",
        choices=("nearest", "compensated"),
        default="nearest",
        help="compensated: calibrates, better 4-bit pictures",
    )
    quantize.add_argument("--clip", type=_clip, help='shrink group ranges: a ratio in (0, 1], or "search"')
    quantize.add_argument(
        "--step",
        type=_step,
        default=DEFAULT_STEP,
        help='the step to calibrate on: index, fraction, or "all" (default: %(default)s)',
    )
    quantize.add_argument(
        "--samples",
        type=_count,
        default=DEFAULT_PICTURES,
        help="pictures in the calibration run (default: %(default)s)",
    )
    quantize.add_argument("--seed", type=_seed, default=0, help="of the calibration run (default: %(default)s)")
    _sampling_options(quantize, 4.0)

    generate = command(
        "generate",
        generate_command,
        "draw pictures with a quantized or original class-conditional DiT",
        "  ditq generate ./dit-w8a8 --class 207 360 --seed 0 1 --out dogs-and-otters.png\n"
        "  ditq generate ./fashion-w4 --class sneaker bag --seed 3 --out pictures.png",
    )
    generate.add_argument("directory", metavar="DIR", help="what ditq quantize wrote, or a diffusers model or pipeline")
    generate.add_argument("--class", dest="classes", nargs="+", required=True, metavar="CLASS", help="names or indices")
    generate.add_argument(
        "--seed", type=_seed, nargs="+", default=[0], help="one row of pictures per seed (default: 0)"
    )
    generate.add_argument("--out", type=Path, default=Path("pictures.png"), help="PNG to write (default: %(default)s)")
    _sampling_options(generate, 2.0)

    demo = command(
        "demo",
        demo_command,
        "quantize the embedded model by every scheme and compare the pictures",
        "  ditq demo --out out/demo\n  ditq demo --steps 10 --samples-per-class 1 --out /tmp/quick",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="directory for the report (default: %(default)s)"
    )
    demo.add_argument("--steps", type=_count, default=50, help="sampling steps (default: %(default)s)")
    demo.add_argument("--samples-per-class", type=_count, default=1, help="pictures per class (default: %(default)s)")

    analysis_command.add_commands(command, _device, _count, _seed)
    evaluation_command.add_commands(command, _device, _count, _seed, _judge)
    benchmark_options.add_commands(command, _device, _count, _inspect_instead)

    inspect = command(
        "inspect",
        inspect_command,
        "compile every kernel for each GPU architecture, with no GPU, and check its machine code",
        "  ditq inspect --arch sm_90\n  ditq inspect --json > machine-code.json",
        device=False,
    )
    inspect.add_argument(
        "--arch",
        type=_architecture,
        nargs="+",
        help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (default: these), sm_103, sm_121",
    )
    inspect.add_argument(
        "--driver", action="store_true", help="load each kernel on this machine's GPU too; its driver must agree"
    )
    inspect.add_argument("--json", action="store_true", help="a list of objects, one a kernel")

    command(
        "env",
        env_command,
        "say what is installed and which backends work here, and why not",
        "  ditq env",
        device=False,
    )
    return parser


def _architecture(text: str) -> int:
    architectures = ("80", "86", "89", "90", "100", "103", "120", "121")
    if text.removeprefix("sm_") not in architectures:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'sm_{arch}' for arch in architectures)}")
    return int(text.removeprefix("sm_"))


def _clip(text: str) -> str | float:
    return text if text == "search" else float(text)


def _step(text: str) -> int | float:
    return text if text == ALL_STEPS else int(text) if text.lstrip("-").isdecimal() else float(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    args = _parser().parse_args(argv)
    from .errors import UnsupportedError

    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("ditq: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*USER_ERRORS, UnsupportedError) as error:
        if os.environ.get("DITQ_DEBUG"):
            raise
        _say_error(error)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
