"""What ``ditq``'s commands are told of sampling: prompts, steps, sizes. Imports at once only what their help needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .. import arguments

if TYPE_CHECKING:
    from .samplers import Sampler


def add_sampling_options(parser: argparse.ArgumentParser, class_guidance: float, videos: bool = True) -> None:
    """Add them; ``videos``: whether they may be drawn."""
    parser.set_defaults(class_guidance=class_guidance, frames=None)
    parser.add_argument("--prompt", nargs="+", metavar="PROMPT", help="what to draw, for pipelines that read prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file of prompts, one a line")
    parser.add_argument("--steps", type=arguments.count, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--guidance",
        type=arguments.number,
        help=f"guidance scale (default: the pipeline's own, {class_guidance} of classes)",
    )
    parser.add_argument("--height", type=arguments.count, help="of pictures in pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=arguments.count, help="the same")
    if videos:
        parser.add_argument("--frames", type=arguments.count, help="of videos (default: the pipeline's own number)")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Those of --prompt and of the lines of --prompts."""
    found = list(args.prompt or ())
    if args.prompts is not None:
        try:
            text = args.prompts.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompts} is no text in UTF-8; it takes one prompt a line") from None
        found += [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError(f"{args.prompts} holds no prompt; it takes one a line")
    return found


def check_words(args: argparse.Namespace, path: Path, needed: bool = True) -> bool:
    """Whether what is in ``path`` is sampled with prompts; ValueError if others are given than it takes."""
    from .samplers import takes_prompts

    prompted = takes_prompts(path)
    given = bool(prompts_of(args))
    if prompted and not given:
        raise ValueError(f"{path} is sampled with prompts; give --prompt, or --prompts with a file of one a line")
    if prompted and getattr(args, "classes", None):
        raise ValueError(f"{path} is sampled with prompts, and knows no --class")
    if not prompted and given:
        raise ValueError(f"{path} is sampled with classes, and reads no --prompt")
    if not prompted and needed and not args.classes:
        raise ValueError(f"{path} is sampled with classes; give --class")
    return prompted


def load_sampler(
    args: argparse.Namespace,
    path: Path,
    prompted: bool,
    *,
    with_vae: bool = True,
    progress: bool = True,
    device: str | None = None,
) -> Sampler:
    """What samples with what is in ``path``.

    Args:
        with_vae: whether latents of classes are to be decoded.
        progress: whether a bar shows the steps of each run.
        device: another than --device.

    Raises:
        ValueError: if it cannot be loaded, or has no autoencoder that it needs.
    """
    from .directories import load_pipeline
    from .samplers import ClassSampler, Drawing, PromptSampler
    from .source import load_source

    guidance = args.guidance if args.guidance is not None or prompted else args.class_guidance
    device = device or arguments.device(args.device)
    how = Drawing(args.steps, guidance, args.height, args.width, args.frames)
    if prompted:
        return PromptSampler(load_pipeline(path).to(device), prompts_of(args), how, progress)
    source = load_source(path, device=device, with_vae=with_vae)
    if with_vae:
        source.check_decodable()
    return ClassSampler(source, how, progress)
