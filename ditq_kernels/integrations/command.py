"""``ditq quantize``, ``calibrate`` and ``generate`` on the command line. Imports at once only what their help needs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..arguments import AddCommand
from ..model.calibration import DEFAULT_MOMENT_STEPS, DEFAULT_PICTURES, DEFAULT_STEP, Calibration
from .options import add_sampling_options, check_words, load_sampler

if TYPE_CHECKING:
    from .samplers import Sampler

FRAMES = 8  # of a video that are shown
STRIDE = 7919  # a prime: classes of calibration runs lie far apart


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; choose another --out, or remove it")


def _calibration_run(args: argparse.Namespace, sampler: Sampler, prompted: bool) -> tuple[list[Any], list[int]]:
    """(subjects, seeds) of the pictures that calibrate."""
    first, stride = (0, 1) if prompted else (args.seed, STRIDE)
    chosen = [(first + i * stride) % len(sampler.subjects) for i in range(args.samples)]
    return [sampler.subjects[index] for index in chosen], [args.seed + i for i in range(args.samples)]


def _calibrated(args: argparse.Namespace, sampler: Sampler, prompted: bool, moments: bool) -> dict[str, Calibration]:
    """Of each denoiser, from one step of each run, or several."""
    from .samplers import calibrated

    runs = sampler.runs(*_calibration_run(args, sampler, prompted))
    return {name: calibrated(model, runs, args.step, moments) for name, model in sampler.denoisers().items()}


def _calibrate(args: argparse.Namespace) -> int:
    _refuse_existing(args.out)
    from .directories import local
    from .quantizing import model_directories

    path = local(args.source)
    model_directories(path)
    prompted = check_words(args, path, needed=False)
    sampler = load_sampler(args, path, prompted, with_vae=False)
    found = _calibrated(args, sampler, prompted, args.moments)
    for name, calibration in found.items():
        file = args.out / f"{name}.safetensors" if len(found) > 1 else args.out
        file.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(file)
        of = calibration.moment_steps or (calibration.step,)
        named = f"step{'s' * (len(of) > 1)} {', '.join(map(str, of))}" if calibration.step is not None else "all steps"
        print(f"{file}: {len(calibration.amax)} layers of {calibration.model}, {named}")
    return 0


def _stored_calibrations(path: Path, denoisers: Sequence[str]) -> dict[str, Calibration]:
    """What ``ditq calibrate`` wrote to ``path``: a file, or one for each denoiser in a directory."""
    if path.is_dir():
        return {name: Calibration.load(path / f"{name}.safetensors") for name in denoisers}
    if len(denoisers) > 1:
        raise ValueError(
            f"{path} is one calibration, and there are {', '.join(denoisers)}; give ditq calibrate's folder"
        )
    return {denoisers[0]: Calibration.load(path)}


def _quantize(args: argparse.Namespace) -> int:
    from ..layer.formats import Scheme
    from ..model.conversion import check, convert
    from ..model.pipelines import is_denoiser

    scheme = Scheme.parse(args.scheme)
    if not args.plan_only:
        if args.out is None:
            raise ValueError("--out is needed: the directory to write the quantized model to (or --plan-only)")
        _refuse_existing(args.out)
    from ..layer.quantizer import check_clip

    check_clip(args.clip)
    moments = args.rounding == "compensated"
    from .directories import load_model, local
    from .quantizing import check_target, model_directories, plans_of, write

    path = local(args.source)
    directories = model_directories(path, args.components)
    denoisers = [name for name in directories if is_denoiser(name)]
    needed = bool(denoisers) and (scheme.static or moments)
    runs = needed and args.calibration is None and not args.plan_only
    prompted = check_words(args, path, needed=False) if runs else False
    stored = _stored_calibrations(args.calibration, denoisers) if args.calibration is not None else {}
    plans = plans_of(directories, scheme, stored)
    for name, chosen in plans.items():
        print(f"{name}: {chosen}" if name else chosen)
    if args.plan_only:
        return 0
    check_target(path, args.out)
    models: dict[str, Any] = dict(plans)
    if needed:
        sampler = load_sampler(args, path, prompted, with_vae=False) if runs else None
        found = _calibrated(args, sampler, prompted, moments) if sampler else stored
        for name in denoisers:
            model = sampler.denoisers()[name] if sampler else load_model(path / name)
            check(model, plans[name], found[name], args.rounding, args.clip)
            models[name] = convert(model, plans[name], found[name], args.rounding, clip=args.clip, progress=True)
    write(path, args.out, models, args.clip)
    _say_sizes(args.out, plans)
    return 0


def _say_sizes(out: Path, plans: dict[str, Any]) -> None:
    entries = [entry for chosen in plans.values() for entry in chosen.quantized()]
    weights, bits = sum(entry.weights for entry in entries), sum(entry.stored_bits for entry in entries)
    print(
        f"{out}: {len(entries)} layers quantized, {weights / 1e6:.1f} M weights in {bits / 8e6:.1f} MB "
        f"({bits / weights:.2f} bits per weight; in 16 bits they take {2 * weights / 1e6:.1f} MB)"
    )


def _class_index(name: str, labels: dict[str, int], classes: int) -> int:
    if name.isdecimal():
        index = int(name)
        if index >= classes:
            raise ValueError(f"class {index} does not exist: this model's classes are 0 to {classes - 1}")
        return index
    if name in labels:
        return labels[name]
    known = f"names such as {', '.join(list(labels)[:10])}, or " if labels else ""
    raise ValueError(f"unknown class {name!r}; this model knows {known}indices 0 to {classes - 1}")


def _generate(args: argparse.Namespace) -> int:
    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out} is a directory; name a PNG file")
    from .directories import local

    path = local(args.source)
    prompted = check_words(args, path)
    from .sampling import save_grid

    sampler = load_sampler(args, path, prompted)
    subjects = sampler.subjects
    if not prompted:
        subjects = [_class_index(name, sampler.source.labels, len(subjects)) for name in args.classes]
    pairs = [(subject, seed) for seed in args.seed for subject in subjects]
    drawn = sampler.draw([subject for subject, _ in pairs], [seed for _, seed in pairs])
    save_grid(*_rows(drawn, len(subjects)), args.out)
    kind = "videos, a row of frames each" if len(drawn[0]) > 1 else "pictures"
    print(f"{args.out}: {len(pairs)} {kind}")
    return 0


def _rows(drawn: list[Any], columns: int) -> tuple[Any, int]:
    """Pictures for a grid, and its columns: a row for each seed; of a video a row, of frames over all its time."""
    import torch

    count = len(drawn[0])
    if count == 1:
        return torch.cat(drawn), columns
    shown = torch.linspace(0, count - 1, min(count, FRAMES)).round().long()
    return torch.cat([frames[shown] for frames in drawn]), len(shown)


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step",
        type=arguments.step,
        help='the step to calibrate on: index, fraction, "all", or several with commas between, of which the first '
        f"gives ranges and all give second moments (default: {DEFAULT_STEP}, for compensated rounding "
        f"{','.join(map(str, DEFAULT_MOMENT_STEPS))})",
    )
    parser.add_argument(
        "--samples",
        type=arguments.count,
        default=DEFAULT_PICTURES,
        help="pictures in the calibration run, of prompts or classes in turn (default: %(default)s)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the calibration run (default: %(default)s)")
    add_sampling_options(parser, 4.0)


def add_commands(command: AddCommand) -> None:
    """Add the commands by ``command(name, run, help, examples)``."""
    source = "directory of a model or pipeline, or a hub name (owner/name)"
    quantize = command(
        "quantize",
        _quantize,
        "quantize a diffusers model or pipeline and save it",
        "  ditq quantize ./DiT-XL-2-256 --scheme w8a8 --out ./dit-w8a8\n"
        "  ditq quantize ./FLUX.1-dev --scheme w4a8_g128 --out ./flux-w4a8\n"
        "  ditq quantize ./FLUX.1-dev --scheme w4a8_g128 --rounding compensated --prompts prompts.txt --out ./flux-w4\n"
        "  ditq quantize facebook/DiT-XL-2-256 --scheme w4a16_g128 --plan-only",
    )
    quantize.add_argument("source", metavar="SRC", help=source)
    quantize.add_argument("--scheme", required=True, help="w8a8, w8a8_static, w4a8_g128, w4a16_g128 ...")
    quantize.add_argument("--out", type=Path, help="directory to write; must not exist")
    quantize.add_argument("--plan-only", action="store_true", help="print what would be done to each layer, and stop")
    quantize.add_argument(
        "--components",
        nargs="+",
        metavar="NAME",
        help="of a pipeline, what is quantized (default: transformers, and text encoders in their weights)",
    )
    quantize.add_argument(
        "--rounding",
        choices=("nearest", "compensated"),
        default="nearest",
        help="compensated: calibrates, better 4-bit pictures",
    )
    quantize.add_argument("--clip", type=arguments.clip, help='shrink group ranges: a ratio in (0, 1], or "search"')
    quantize.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what ditq calibrate wrote, in place of a run of its own"
    )
    _calibration_options(quantize)

    calibrate = command(
        "calibrate",
        _calibrate,
        "observe one step of a sampling run, for static schemes and compensated rounding",
        "  ditq calibrate ./FLUX.1-dev --prompts prompts.txt --moments --out flux.safetensors\n"
        "  ditq quantize ./FLUX.1-dev --scheme w8a8_static --calibration flux.safetensors --out ./flux-w8a8",
    )
    calibrate.add_argument("source", metavar="SRC", help=source)
    calibrate.add_argument(
        "--out", type=Path, required=True, help="file to write; a folder of several denoisers' files"
    )
    calibrate.add_argument("--moments", action="store_true", help="also second moments, for compensated rounding")
    _calibration_options(calibrate)

    generate = command(
        "generate",
        _generate,
        "draw pictures or videos with a quantized or original model or pipeline",
        "  ditq generate ./dit-w8a8 --class 207 360 --seed 0 1 --out dogs-and-otters.png\n"
        '  ditq generate ./flux-w4a8 --prompt "an otter at a desk" "a fox" --steps 28 --out pictures.png\n'
        "  ditq generate ./fashion-w4 --class sneaker bag --seed 3 --out pictures.png",
    )
    generate.add_argument("source", metavar="DIR", help="what ditq quantize wrote, or a diffusers model or pipeline")
    generate.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="names or indices of classes")
    generate.add_argument(
        "--seed", type=arguments.seed, nargs="+", default=[0], help="one row of pictures per seed (default: 0)"
    )
    generate.add_argument("--out", type=Path, default=Path("pictures.png"), help="PNG to write (default: %(default)s)")
    add_sampling_options(generate, 2.0)
