"""The comparison as a picture for people, a page, and JSON."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from .. import __version__
from ..files import written_whole
from ..model.calibration import Calibration
from .fashion_mnist import CLASS_NAMES
from .run import Result, Settings, noise_floor

PICTURE_FILE, PAGE_FILE, REPORT_FILE = "samples.png", "report.md", "report.json"
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
    "backend",
)


def check_output(directory: Path) -> None:
    """Raise FileExistsError if ``directory`` is a file, or holds anything but an earlier demo's output."""
    if not directory.exists():
        return
    entries = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {directory.name}
    foreign = entries - {PICTURE_FILE, PAGE_FILE, REPORT_FILE}
    if foreign or (entries and not _is_report(directory / REPORT_FILE)):
        raise FileExistsError(f"{directory} exists and is not an earlier demo's output; choose another with --out")


def _is_report(path: Path) -> bool:
    """Whether a demo wrote ``path``: other programs have a report.json too, and theirs is not ours to replace."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("made_by") == MADE_BY


def draw_grid(results: list[Result], settings: Settings, path: Path) -> None:
    """One row of pictures per result, one column per class and seed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = settings.classes * settings.seeds
    # Seeds of one class side by side.
    order = [seed * settings.classes + label for label in range(settings.classes) for seed in range(settings.seeds)]
    figure, axes = plt.subplots(
        len(results), count, figsize=(0.62 * count + 3.4, 0.66 * len(results) + 0.9), squeeze=False, facecolor="white"
    )
    for position, (row, result) in enumerate(zip(axes, results, strict=True)):
        for column, (axis, index) in enumerate(zip(row, order, strict=True)):
            axis.imshow(result.pictures[index, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if position == 0 and column % settings.seeds == 0:
                name = (
                    CLASS_NAMES[settings.labels[index]]
                    if settings.classes <= len(CLASS_NAMES)
                    else str(settings.labels[index])
                )
                axis.set_title(name, fontsize=9, loc="left")
        quality = "reference" if result.psnr_db is None else f"{result.psnr_db:.1f} dB"
        bits = "" if result.bits_per_weight is None else f", {result.bits_per_weight:.2f} bits"
        row[0].text(
            -0.2,
            0.5,
            f"{result.name}\n{quality}{bits}",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
        )
    figure.subplots_adjust(
        left=2.5 / figure.get_figwidth(),
        right=0.995,
        top=1 - 0.35 / figure.get_figheight(),
        bottom=0.01,
        wspace=0.04,
        hspace=0.06,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cells(result: Result) -> list[str]:
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
        result.backend,
    ]


def table(results: list[Result]) -> str:
    """The results as a Markdown table, aligned for reading in a terminal."""
    rows = [list(COLUMNS), *map(_cells, results)]
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
    meaning = {"reference": "the CPU implementation", "triton": "the Triton kernels"}.get(
        implementation, implementation
    )
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
        "Seconds are this machine's, for the whole batch, and say nothing about a GPU.",
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
