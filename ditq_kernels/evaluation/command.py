"""``ditq evaluate`` on the command line. Imports at once only what its help needs."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..arguments import AddCommand
from ..integrations.options import add_sampling_options, check_words, load_sampler
from ..model.calibration import DEFAULT_MOMENT_STEPS, DEFAULT_STEP
from ..model.conversion import ROUNDINGS

if TYPE_CHECKING:
    from .run import Judge

COLUMNS = 10  # of pictures.png


def _processes(device: str) -> tuple[int, int, str, Callable[[], Any]]:
    """(this process, how many, its device, a barrier), as ``accelerate launch`` started them.

    Raises:
        ValueError: if ``device`` is one of several GPUs: each process takes its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, device, lambda: None
    from accelerate import PartialState

    if ":" in device:
        raise ValueError(f"each of several processes takes a GPU of its own; leave --device {device} out")
    # Without a GPU it would see one process unless told. A process whose share is done waits for the others' as long as
    # it takes.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    return state.process_index, state.num_processes, str(state.device), state.wait_for_everyone


def _evaluate(args: argparse.Namespace, device: str, judge_of: Callable[[Any], Judge | None]) -> int:
    import diffusers
    import torch
    import torchmetrics  # noqa: F401  a missing one is said before the drawing, not after it
    from tqdm import tqdm

    from .. import __version__
    from ..integrations.directories import local
    from ..integrations.samplers import check_draws_pictures
    from ..integrations.sampling import save_grid
    from ..layer.grid import DEFAULT_ZERO_POINT
    from . import report
    from .run import Evaluation, Settings
    from .samples import save_for_other_evaluators
    from .variants import variants

    first, *others = args.sources
    path = local(first)
    prompted = check_words(args, path, needed=False)
    if prompted:
        check_draws_pictures(path)
    wanted = list(variants(args.schemes, [Path(other) for other in others], args.rounding))
    process, processes, device, wait = _processes(device)
    sampler = load_sampler(args, path, prompted, progress=False, device=device)
    (model,) = sampler.denoisers().values()
    if not prompted:
        model.float()
    wanted = [variant for variant in wanted if variant.dtype != model.dtype]  # it is the original
    batch = 1 if prompted else min(args.batch, args.samples)
    settings = Settings(args.samples, batch, args.seed)
    judge = None if prompted else judge_of(model)
    where = args.out / "samples"
    evaluation = Evaluation(sampler, str(first), settings, where, judge, process, processes)
    for variant in wanted:
        evaluation.check(variant)
    for variant in tqdm(wanted, desc="draw", unit="model", disable=process > 0):
        evaluation.draw(variant)
    wait()
    if process > 0:
        return 0
    rows = [evaluation.row(variant) for variant in tqdm(wanted, desc="judge", unit="model")]
    about = dict(
        sources=list(map(str, args.sources)),
        samples=args.samples,
        steps=args.steps,
        guidance=sampler.how.guidance,
        **(dict(prompts=sampler.subjects, height=args.height, width=args.width) if prompted else {}),
        seed=args.seed,
        judge=judge and judge.name,
        calibration=dict(step=DEFAULT_STEP, moment_steps=DEFAULT_MOMENT_STEPS, pictures=settings.calibration_pictures),
        zero_point=DEFAULT_ZERO_POINT,
        fingerprint=evaluation.request(wanted[0]).fingerprint,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        ditq_kernels=__version__,
        machine=f"{device}, {platform.machine()}",
    )
    report.write_json(rows, about, args.out / "results.json")
    report.draw_steps(rows, args.out / "steps.png")
    report.draw_layers(rows, args.out / "layers.png")
    columns = min(COLUMNS, args.samples)
    shown = torch.cat([evaluation.first_pictures(variant, columns) for variant in wanted])
    save_grid(shown, columns, args.out / "pictures.png")
    if args.npz:
        for variant in wanted:
            path = args.out / f"{evaluation.folder(variant).name}.npz"
            save_for_other_evaluators(evaluation.pictures(variant), evaluation.request(variant).labels, path)
    print(report.table(rows, judge and judge.name))
    if judge and args.samples <= judge.num_features:
        print(
            f"No Fréchet distance: {args.samples} pictures are too few for the covariance of {judge.num_features} "
            f"features; draw at least {judge.num_features + 1}, better ten times as many."
        )
    print("\nthe rows of pictures.png are those above")
    written = [args.out / name for name in ("results.json", "pictures.png", "steps.png", "layers.png")]
    print("  ".join(str(path) for path in written if path.exists()))
    return 0


def add_commands(command: AddCommand, judge_of: Callable[[Any], Judge | None]) -> None:
    """Add the command by ``command(name, run, help, examples)``.

    Args:
        judge_of: the classifier for a model's pictures, if there is one.
    """
    evaluate = command(
        "evaluate",
        lambda args: _evaluate(args, arguments.device(args.device), judge_of),
        "draw many pictures with the original and with every scheme, and compare them, with the noise floor beside",
        "  ditq evaluate ./DiT-XL-2-256 --schemes w8a8 w4a8_g128 --samples 500 --out ./evaluation\n"
        "  ditq evaluate ./FLUX.1-dev --prompts prompts.txt --samples 20 --steps 28 --out ./evaluation\n"
        "  accelerate launch --multi_gpu --num_processes 2 -m ditq_kernels evaluate SRC --out ./evaluation",
    )
    evaluate.add_argument(
        "sources",
        metavar="SRC",
        nargs="+",
        help="directory of a model or pipeline, or a hub name (owner/name); further ones, as ditq quantize writes, "
        "are compared with the first",
    )
    evaluate.add_argument(
        "--out", type=Path, required=True, help="directory; samples that it holds already are not drawn again"
    )
    evaluate.add_argument(
        "--schemes",
        nargs="*",
        metavar="SCHEME",
        default=["w8a8", "w8a8_static", "w4a8_g128"],
        help="what to compare (default: %(default)s)",
    )
    evaluate.add_argument(
        "--rounding",
        nargs="+",
        choices=ROUNDINGS,
        default=ROUNDINGS,
        help="of 4-bit weights (default: both)",
    )
    evaluate.add_argument(
        "--samples", type=arguments.count, default=100, help="pictures of each (default: %(default)s)"
    )
    evaluate.add_argument(
        "--batch", type=arguments.count, default=50, help="pictures of classes drawn at once (default: %(default)s)"
    )
    evaluate.add_argument("--seed", type=arguments.seed, default=0, help="of the first picture (default: %(default)s)")
    add_sampling_options(evaluate, 2.0, videos=False)
    evaluate.add_argument("--npz", action="store_true", help="also write the pictures as other evaluators read them")
