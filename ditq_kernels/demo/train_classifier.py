"""Train the classifier that judges the embedded model's pictures.

python -m ditq_kernels.demo.train_classifier --out out/fashion_classifier
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from . import fashion_mnist
from .classifier import FashionClassifier, accuracy

BATCH = 128
PEAK_RATE = 4e-3
SHIFT = 1


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures mirrored, each moved by up to ``SHIFT`` pixels either way; [B, 1, H, W] to the same."""
    count, _, height, width = pictures.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)
    padded = torch.nn.functional.pad(pictures, (SHIFT,) * 4, value=-1.0)  # -1 is black
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(out: Path, data: Path, epochs: int, seed: int) -> float:
    """Train for ``epochs`` epochs, write weights (fp16) and ``training.json`` to ``out``, and return the test
    accuracy.
    """
    pictures, labels = fashion_mnist.load("train", data)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = FashionClassifier().to(memory_format=torch.channels_last)  # faster convolutions on a CPU
    steps = epochs * (len(pictures) // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    started = time.perf_counter()
    with tqdm(total=steps, desc="training the classifier", unit="step", mininterval=2) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(pictures), generator=generator)
            for rows in order[: steps // epochs * BATCH].split(BATCH):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = classifier(augment(pictures[rows], generator))
                loss = torch.nn.functional.cross_entropy(logits.float(), labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    classifier.half().float().eval()  # judged as it is stored
    reached = accuracy(classifier, *fashion_mnist.load("test", data))
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: w.half().contiguous() if w.is_floating_point() else w for name, w in classifier.state_dict().items()},
        out / "model.safetensors",
    )
    minutes = round((time.perf_counter() - started) / 60, 1)
    record = dict(
        test_accuracy=reached, epochs=epochs, batch=BATCH, seed=seed, minutes=minutes, torch=torch.__version__
    )
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/fashion_classifier"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_DIRECTORY, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"test accuracy {train(args.out, args.data, args.epochs, args.seed):.4f}")


if __name__ == "__main__":
    main()
