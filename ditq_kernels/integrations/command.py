"""``ditq quantize`` and ``ditq generate`` on the command line. Imports at once only what their help needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import arguments
from ..arguments import AddCommand
from ..model.calibration import DEFAULT_PICTURES, DEFAULT_STEP


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another --out, or remove it")


def _calibrate(source, args: argparse.Namespace, scheme):
    """The calibration that ``args`` need, or None: static schemes and compensated rounding are the ones that need
    it.
    """
    if not scheme.static and args.rounding != "compensated":
        return None
    from ..model.calibration import calibrate
    from .sampling import default_scheduler, sample

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


def _quantize(args: argparse.Namespace) -> int:
    from ..layer.formats import Scheme
    from ..model.conversion import check_unquantized, plan, quantize, quantized_layers

    scheme = Scheme.parse(args.scheme)
    if not args.plan_only:
        if args.out is None:
            raise ValueError("--out is needed: the directory to write the quantized model to (or --plan-only)")
        _refuse_existing(args.out)
    from .source import check_target, load_source, save_quantized

    source = load_source(args.source, device=arguments.device(args.device))
    check_unquantized(source.transformer, scheme.name)
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


def _generate(args: argparse.Namespace) -> int:
    from .sampling import default_scheduler, sample, save_grid
    from .source import load_source

    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out} is a directory; name a PNG file")
    source = load_source(args.directory, device=arguments.device(args.device), with_vae=True)
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


def _sampling_options(parser: argparse.ArgumentParser, guidance: float) -> None:
    parser.add_argument("--steps", type=arguments.count, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=guidance, help="guidance scale (default: %(default)s)")


def add_commands(command: AddCommand) -> None:
    """Add both commands by ``command(name, run, help, examples)``."""
    quantize = command(
        "quantize",
        _quantize,
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
    quantize.add_argument("--clip", type=arguments.clip, help='shrink group ranges: a ratio in (0, 1], or "search"')
    quantize.add_argument(
        "--step",
        type=arguments.step,
        default=DEFAULT_STEP,
        help='the step to calibrate on: index, fraction, or "all" (default: %(default)s)',
    )
    quantize.add_argument(
        "--samples",
        type=arguments.count,
        default=DEFAULT_PICTURES,
        help="pictures in the calibration run (default: %(default)s)",
    )
    quantize.add_argument(
        "--seed", type=arguments.seed, default=0, help="of the calibration run (default: %(default)s)"
    )
    _sampling_options(quantize, 4.0)

    generate = command(
        "generate",
        _generate,
        "draw pictures with a quantized or original class-conditional DiT",
        "  ditq generate ./dit-w8a8 --class 207 360 --seed 0 1 --out dogs-and-otters.png\n"
        "  ditq generate ./fashion-w4 --class sneaker bag --seed 3 --out pictures.png",
    )
    generate.add_argument("directory", metavar="DIR", help="what ditq quantize wrote, or a diffusers model or pipeline")
    generate.add_argument("--class", dest="classes", nargs="+", required=True, metavar="CLASS", help="names or indices")
    generate.add_argument(
        "--seed", type=arguments.seed, nargs="+", default=[0], help="one row of pictures per seed (default: 0)"
    )
    generate.add_argument("--out", type=Path, default=Path("pictures.png"), help="PNG to write (default: %(default)s)")
    _sampling_options(generate, 2.0)
