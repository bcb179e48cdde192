"""Train a LoRA over the frozen, quantized embedded model: its garments learn to wear stripes.

    python -m ditq_kernels.demo.train_lora --out out/lora

No data set is needed: the quantized model draws its own training pictures, stripes are painted over them, and the
adapter learns to draw such pictures from noise and class alone. Only the adapter is trained (QLoRA, arXiv 2305.14314).
In --out are then pictures of the same seeds before and after, the loss, the model with its adapter as ``ditq.save``
writes it, and the numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import arguments
from ..checkpoint.store import load, save
from ..files import written_whole
from ..integrations.pictures import to_unit_range
from ..integrations.sampling import sample
from ..integrations.source import Source, load_source
from ..layer.formats import SCHEMES
from ..model.conversion import quantize
from ..model.wrappers import own_name
from . import MODEL_DIRECTORY
from .fashion_mnist import CLASS_NAMES
from .run import stored_bytes
from .train_dit import training_batch

PICTURE_FILE, LOSS_FILE, REPORT_FILE, MODEL_FOLDER = "pictures.png", "loss.png", "report.json", "model"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]  # attention and MLP of every block
FIRST_TRAINING_SEED = 100_000  # far from the seeds of the pictures that are shown
AVERAGED = 10  # training steps whose mean loss is called the first and the last


@dataclass(frozen=True)
class Settings:
    """What is trained, and what is drawn: one picture of each class, before and after."""

    scheme: str = "w4a16_g128"
    rank: int = 8
    steps: int = 80
    batch: int = 16
    learning_rate: float = 3e-3
    seed: int = 0
    training_pictures: int = 50
    sampling_steps: int = 10
    guidance: float = 2.0
    device: str = "cpu"


@dataclass(eq=False)
class Result:
    """What a training came to.

    Attributes:
        model: frozen and quantized, the trained adapter around its layers.
        before, after: pictures [10, 1, H, W] in [-1, 1] of the same seeds, one of each class.
        striped: the pictures before with stripes painted over: what the adapter is to come to.
        losses: of every training step.
        trained, frozen: how many parameters the adapter has, and the model in 16 bits.
        base_unchanged: whether every bit of the model is as it was before the training.
        bytes_16_bits, bytes_quantized: of the model without its adapter.
        seconds: of drawing the training pictures and of training.
    """

    model: nn.Module
    before: torch.Tensor
    after: torch.Tensor
    striped: torch.Tensor
    losses: list[float]
    trained: int
    frozen: int
    base_unchanged: bool
    bytes_16_bits: int
    bytes_quantized: int
    seconds: dict[str, float]

    @property
    def first_loss(self) -> float:
        return sum(self.losses[:AVERAGED]) / len(self.losses[:AVERAGED])

    @property
    def last_loss(self) -> float:
        return sum(self.losses[-AVERAGED:]) / len(self.losses[-AVERAGED:])


def stripes(pictures: torch.Tensor) -> torch.Tensor:
    """``pictures`` [B, C, H, W] in [-1, 1], two rows of every four darkened; black stays black."""
    dark = (torch.arange(pictures.shape[2]) % 4 >= 2).view(-1, 1)
    return torch.where(dark, 0.25 * (pictures + 1) - 1, pictures)


def attach(model: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Freeze ``model`` and put a LoRA around its attention and MLP layers, in place; the LoRA's parameters, in fp32."""
    import peft

    model.requires_grad_(False)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # the model is in bf16, too coarse for an optimizer's small steps
    return trained


def train(
    model: nn.Module,
    scheduler: Any,
    trained: Sequence[nn.Parameter],
    pictures: torch.Tensor,
    labels: torch.Tensor,
    settings: Settings,
) -> list[float]:
    """The loss of each of ``settings.steps`` steps, which change nothing but ``trained``."""
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    losses: list[float] = []
    bar = tqdm(range(settings.steps), desc="training", unit="step")
    for step in bar:
        batch = training_batch(step, settings.batch, settings.seed, pictures, labels)
        x0, noise, timesteps, y = (part.to(settings.device) for part in batch)
        noisy = scheduler.add_noise(x0, noise, timesteps)
        prediction = model(noisy.to(torch.bfloat16), timestep=timesteps, class_labels=y).sample
        loss = nn.functional.mse_loss(prediction.float(), scheduler.get_velocity(x0, noise, timesteps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-AVERAGED:]) / len(losses[-AVERAGED:]):.4f}", refresh=False)
    return losses


def draw(
    model: nn.Module, source: Source, labels: Sequence[int], seeds: Sequence[int], settings: Settings
) -> torch.Tensor:
    """Pictures [B, 1, H, W] of ``labels``, clamped to [-1, 1]."""
    steps, guidance = settings.sampling_steps, settings.guidance
    samples = sample(model, source.scheduler, labels, seeds, steps=steps, guidance=guidance)
    return samples.clamp(-1, 1)


def run(settings: Settings, model_directory: Path = MODEL_DIRECTORY) -> Result:
    """Quantize the model, freeze it, and train a LoRA over it; the same settings give the same bits on one machine.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if a batch is larger than all training pictures are.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters are made by peft, which is not installed: pip install 'ditq_kernels[adapters]'")
    if settings.batch > settings.training_pictures:
        raise ValueError(
            f"a batch of {settings.batch} cannot be taken from {settings.training_pictures} training pictures; have "
            "more of them drawn, or take a smaller batch"
        )
    source = load_source(model_directory)
    model = source.transformer.to(settings.device)
    for parameter in model.parameters():  # no buffers: positions are computed anew in fp32 when a model is loaded
        parameter.data = parameter.data.to(torch.bfloat16)
    frozen, bytes_16_bits = sum(parameter.numel() for parameter in model.parameters()), stored_bytes(model)
    quantize(model, settings.scheme)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = range(len(CLASS_NAMES))
    before = draw(model, source, classes, classes, settings)
    started = time.perf_counter()
    labels = [index % len(classes) for index in range(settings.training_pictures)]
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + len(labels))
    pictures = stripes(draw(model, source, labels, seeds, settings))
    drawn = time.perf_counter()
    bytes_quantized = stored_bytes(model)
    trained = attach(model, settings.rank, settings.seed)
    losses = train(model, source.scheduler, trained, pictures, torch.tensor(labels), settings)
    seconds = dict(drawing=drawn - started, training=time.perf_counter() - drawn)
    now = {own_name(name): tensor for name, tensor in model.state_dict().items()}
    return Result(
        model=model,
        before=before,
        after=draw(model, source, classes, classes, settings),
        striped=stripes(before),
        losses=losses,
        trained=sum(parameter.numel() for parameter in trained),
        frozen=frozen,
        base_unchanged=all(torch.equal(now[name], tensor) for name, tensor in bits.items()),
        bytes_16_bits=bytes_16_bits,
        bytes_quantized=bytes_quantized,
        seconds=seconds,
    )


def redrawn(directory: Path, settings: Settings, model_directory: Path = MODEL_DIRECTORY) -> torch.Tensor:
    """The pictures "after", by the model and adapter that were saved to ``directory``."""
    source = load_source(model_directory)
    classes = range(len(CLASS_NAMES))
    return draw(load(directory, settings.device), source, classes, classes, settings)


def plot_pictures(result: Result, settings: Settings, path: Path) -> None:
    """A row of pictures without the adapter, one with it, and one of what it was to come to; a column per class."""
    plt = _pyplot()
    rows = {
        f"{settings.scheme},\nfrozen": result.before,
        f"with the LoRA,\nafter {settings.steps} steps": result.after,
        "first row,\nstripes painted\nover it": result.striped,
    }
    figure, axes = plt.subplots(3, len(CLASS_NAMES), figsize=(10.4, 3.4), facecolor="white")
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, to_unit_range(pictures), strict=True):
            axis.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, name in zip(axes[0], CLASS_NAMES, strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle("The same classes and seeds without and with the trained adapter", fontsize=11)
    figure.subplots_adjust(left=0.135, right=0.995, top=0.84, bottom=0.01, wspace=0.04, hspace=0.06)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_loss(result: Result, settings: Settings, path: Path) -> None:
    """The loss of each step, and its mean over :data:`AVERAGED` of them."""
    plt = _pyplot()
    losses = torch.tensor(result.losses)
    figure, axis = plt.subplots(figsize=(6.4, 3.6), facecolor="white", layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=1, label="one step")
    if len(losses) >= AVERAGED:
        means = losses.unfold(0, AVERAGED, 1).mean(1)
        axis.plot(range(AVERAGED, len(losses) + 1), means, color="C0", label=f"mean of {AVERAGED} steps")
    axis.set(xlabel="training step", ylabel="squared error of the velocity", ylim=(0, None))
    axis.set_title(f"LoRA of rank {settings.rank} over the frozen model in {settings.scheme}", fontsize=10)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_free(out: Path) -> None:
    """Raise FileExistsError if something is at ``out``, unless it is an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; choose another directory with --out, or remove it")


def write(result: Result, settings: Settings, out: Path, model_directory: Path = MODEL_DIRECTORY) -> dict[str, Any]:
    """Write everything to the directory ``out``, which appears whole or not at all; the numbers of ``report.json``.

    Raises:
        FileExistsError: as :func:`check_free`.
    """
    check_free(out)
    with written_whole(out) as unfinished:
        save(result.model, unfinished / MODEL_FOLDER)
        again = redrawn(unfinished / MODEL_FOLDER, settings, model_directory)
        plot_pictures(result, settings, unfinished / PICTURE_FILE)
        plot_loss(result, settings, unfinished / LOSS_FILE)
        record = dict(
            settings=asdict(settings),
            first_loss=result.first_loss,
            last_loss=result.last_loss,
            trained_parameters=result.trained,
            frozen_parameters=result.frozen,
            base_unchanged=result.base_unchanged,
            reloaded_draws_the_same=torch.equal(again, result.after),
            bytes_16_bits=result.bytes_16_bits,
            bytes_quantized=result.bytes_quantized,
            seconds={name: round(value, 1) for name, value in result.seconds.items()},
            losses=[round(loss, 5) for loss in result.losses],
        )
        (unfinished / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return record


def summary(record: dict[str, Any], out: Path) -> str:
    """A training's numbers in a few lines."""
    settings, seconds = record["settings"], record["seconds"]
    trained, frozen = record["trained_parameters"], record["frozen_parameters"]
    sixteen, quantized = record["bytes_16_bits"], record["bytes_quantized"]
    return "\n".join(
        [
            f"loss: {record['first_loss']:.4f} in the first {AVERAGED} steps, {record['last_loss']:.4f} in the last, "
            f"of {settings['steps']}",
            f"trained: {trained:,} parameters over {frozen:,} frozen ones ({trained / frozen:.1%})",
            f"frozen model: {quantized / 1e6:.2f} MB in {settings['scheme']}, {sixteen / 1e6:.2f} MB in 16 bits; "
            f"{'not a bit of it changed' if record['base_unchanged'] else 'IT CHANGED'}",
            "saved and loaded again it draws "
            f"{'the same pictures, bit for bit' if record['reloaded_draws_the_same'] else 'OTHER PICTURES'}",
            f"{seconds['drawing']:.0f} s for {settings['training_pictures']} training pictures, "
            f"{seconds['training']:.0f} s of training on {settings['device']}",
            f"pictures: {out / PICTURE_FILE}   loss: {out / LOSS_FILE}   model: {out / MODEL_FOLDER}   "
            f"numbers: {out / REPORT_FILE}",
        ]
    )


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/lora"), help="a new directory (default: %(default)s)")
    parser.add_argument(
        "--scheme",
        choices=[name for name, scheme in SCHEMES.items() if not scheme.static],
        metavar="SCHEME",
        default=default.scheme,
        help="of the frozen model, any that needs no calibration (default: %(default)s)",
    )
    for name, kind, meaning in (
        ("rank", arguments.count, "of the adapter"),
        ("steps", arguments.count, "of training"),
        ("batch", arguments.count, "pictures in a step"),
        ("learning-rate", float, "at its peak"),
        ("seed", arguments.seed, "of the adapter and of its training"),
        ("training-pictures", arguments.count, "that the model draws to be trained on"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    try:
        check_free(args.out)
        settings = Settings(**options | {"device": arguments.device(args.device)})
        record = write(run(settings), settings, args.out)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    print(summary(record, args.out))


if __name__ == "__main__":
    main()
