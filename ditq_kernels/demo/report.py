"""The comparison as a picture for people, a page, and JSON."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from .. import __version__
from ..evaluation.variants import BF16
from ..files import written_whole
from ..model.calibration import Calibration
from .fashion_mnist import CLASS_NAMES
from .run import Result, Settings, noise_floor

PICTURE_FILE, SMALL_PICTURE_FILE, PAGE_FILE, REPORT_FILE = "samples.png", "small.png", "report.md", "report.json"
AMPLIFIED = 8  # how many times a difference is shown
# What the small picture shows: a row of 8 bits, and one of 4 each way.
SMALL_ROWS = ("original", "original, bf16", "w8a8", "w4a8_g128", "w4a8_g128 compensated")
SMALL_CLASSES = 6
MADE_BY = "ditq demo"
COLUMNS = (
    "scheme",
    "rounding",
    "PSNR dB",
    "worst",
    "SSIM",
    "class accuracy",
    "bits/weight",
    "weights MB",
    "model MB",
    "ms/step",
    "speed to bf16",
    "backend",
)


def check_output(directory: Path) -> None:
    """Raise FileExistsError if ``directory`` is a file, or holds anything but an earlier demo's output."""
    if not directory.exists():
        return
    entries = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {directory.name}
    foreign = entries - {PICTURE_FILE, SMALL_PICTURE_FILE, PAGE_FILE, REPORT_FILE}
    if foreign or (entries and not _is_report(directory / REPORT_FILE)):
        raise FileExistsError(f"{directory} exists and is not an earlier demo's output; choose another with --out")


def _is_report(path: Path) -> bool:
    """Whether a demo wrote ``path``: other programs have a report.json too, and theirs is not ours to replace."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("made_by") == MADE_BY


def _draw_block(grid, shown: list[int], pictures: list[torch.Tensor], **how) -> list:
    """One row of ``pictures`` [count, H, W] each; the axes of the first column."""
    axes = grid.subplots(squeeze=False)
    for row, images in zip(axes, pictures, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.numpy(), **how)
            axis.set_axis_off()
    for axis, label in zip(axes[0], shown, strict=True):
        axis.set_title(CLASS_NAMES[label] if label < len(CLASS_NAMES) else str(label), fontsize=8)
    return [row[0] for row in axes]


def draw_grid(results: list[Result], settings: Settings, path: Path, classes: int | None = None) -> None:
    """As a PNG, one row per result: the first picture of each class, or of the first ``classes`` of them, and beside
    them what they differ by from the first result's, amplified.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(range(min(classes or settings.classes, settings.classes)))
    pictures = [result.pictures[shown, 0] for result in results]
    differences = [one - pictures[0] for one in pictures]
    width, height = 2 * 0.62 * len(shown) + 3.0, 0.66 * len(results) + 0.75
    figure = plt.figure(figsize=(width, height), facecolor="white")
    top = 1 - 0.62 / height
    space = dict(bottom=0.01, top=top, wspace=0.04, hspace=0.06)
    middle = (2.5 + 0.62 * len(shown)) / width
    blocks = (
        (figure.add_gridspec(len(results), len(shown), left=2.5 / width, right=middle, **space), pictures),
        (figure.add_gridspec(len(results), len(shown), left=middle + 0.3 / width, right=0.995, **space), differences),
    )
    (grid, drawn), (beside, changed) = blocks
    first = _draw_block(grid, shown, drawn, cmap="gray", vmin=0, vmax=1)
    reach = 1 / AMPLIFIED
    _draw_block(beside, shown, changed, cmap="RdBu_r", vmin=-reach, vmax=reach)
    for axis, result in zip(first, results, strict=True):
        quality = "reference" if result.psnr_db is None else f"{result.psnr_db:.1f} dB"
        bits = "" if result.bits_per_weight is None else f", {result.bits_per_weight:.2f} bits"
        axis.text(
            -0.2, 0.5, f"{result.name}\n{quality}{bits}", transform=axis.transAxes, ha="right", va="center", fontsize=9
        )
    heading = dict(y=1 - 0.18 / height, ha="left", va="center", fontsize=9, weight="bold")
    figure.text(2.5 / width, s="pictures", **heading)
    figure.text(middle + 0.3 / width, s=f"difference to the original, times {AMPLIFIED}", **heading)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cells(result: Result, bf16_seconds: float | None) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        result.scheme or result.name,
        result.rounding or "",
        number(result.psnr_db, ".1f"),
        number(result.psnr_db_worst, ".1f"),
        number(result.ssim, ".4f"),
        number(result.accuracy, ".0%"),
        number(result.bits_per_weight, ".2f"),
        number(result.quantized_bytes and result.quantized_bytes / 1e6, ".2f"),
        number(result.model_bytes / 1e6, ".2f"),
        number(1000 * result.seconds_per_step, ".0f"),
        number(bf16_seconds and bf16_seconds / result.seconds_per_step, ".2f"),
        result.backend,
    ]


def table(results: list[Result]) -> str:
    """The results as a Markdown table, aligned for reading in a terminal."""
    bf16 = next((result.seconds_per_step for result in results if result.name == BF16.name), None)
    rows = [list(COLUMNS), *(_cells(result, bf16) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def environment(settings: Settings) -> dict[str, str | int | None]:
    """Versions and the machine, as far as the numbers depend on them."""
    import diffusers

    device = torch.device(settings.device)
    return dict(
        ditq_kernels=__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )


def _page(
    results: list[Result], calibration: Calibration, settings: Settings, floor: float | None, machine: dict
) -> str:
    summed = " and ".join(map(str, calibration.moment_steps or (calibration.step,)))
    steps = f"of {calibration.steps} steps ranges from {calibration.step}, moments from {summed}"
    implementation = results[-1].backend
    meaning = {
        "reference": "PyTorch's own products",
        "cpu": "this library's kernels for CPUs",
        "triton": "the Triton kernels",
    }.get(implementation, implementation)
    lines = [
        "# Quantizing the embedded diffusion transformer",
        "",
        f"{len(settings.labels)} pictures per row, the same classes and seeds in each, {settings.steps} DDIM steps, "
        f"guidance {settings.guidance:g}. Activations and moments were calibrated in one sampling run ({steps}).",
        f"The quantized layers ran on {meaning}, on {machine['device']}.",
        "",
        "![samples](samples.png)",
        "",
        table(results),
        "",
        "PSNR (mean and worst picture) and SSIM compare with the original's pictures of the same seeds.",
    ]
    if floor is not None:
        lines.append(
            f"For scale: the original's own pictures of one class and different seeds are {floor:.1f} dB apart."
        )
    lines += [
        "Bits per weight and weights MB count the quantized layers with their scales; model MB counts everything, "
        "unquantized layers in fp32 here.",
        "Times are this machine's, for the whole batch, and say nothing about a GPU; speed to bf16 is the time of the "
        "original in bf16 over the row's, above 1 where the row is faster. "
        "Where PyTorch emulates bf16, a few of its steps are timed.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None),
        "",
    ]
    return "\n".join(lines)


def write_report(results: list[Result], calibration: Calibration, settings: Settings, directory: Path) -> None:
    """Write samples.png, report.md and report.json; an earlier demo's output there is replaced, at once or not at all.

    Raises:
        FileExistsError: if ``directory`` holds anything else.
    """
    check_output(directory)
    floor = noise_floor(results[0].pictures, settings)
    machine = environment(settings)
    with written_whole(directory) as unfinished:
        unfinished.mkdir(parents=True)
        draw_grid(results, settings, unfinished / PICTURE_FILE)
        few = [result for result in results if result.name in SMALL_ROWS]
        draw_grid(few, settings, unfinished / SMALL_PICTURE_FILE, SMALL_CLASSES)
        (unfinished / PAGE_FILE).write_text(_page(results, calibration, settings, floor, machine))
        record = dict(
            made_by=MADE_BY,
            environment=machine,
            settings=asdict(settings),
            calibration=dict(step=calibration.step, steps=calibration.steps, moment_steps=calibration.moment_steps),
            other_seed_psnr_db=floor,
            rows=[{name: value for name, value in vars(result).items() if name != "pictures"} for result in results],
        )
        (unfinished / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
