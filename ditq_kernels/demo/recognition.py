"""How many of the embedded model's class-conditional samples the classifier recognises.

    python -m ditq_kernels.demo.recognition

The result is written to ``recognition.json`` beside the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from ..integrations.sampling import sample
from ..integrations.source import load_source
from . import MODEL_DIRECTORY, fashion_mnist
from .classifier import accuracy, load_classifier

FIRST_SEED = 1_000_000
BATCH = 100


def recognition(directory: Path, per_class: int, steps: int, guidance: float) -> dict:
    """Sample ``per_class`` pictures of each class in bf16; shares recognised, overall and by class."""
    source = load_source(directory)
    source.transformer.to(torch.bfloat16)
    classifier = load_classifier()
    labels = torch.arange(len(fashion_mnist.CLASS_NAMES)).repeat(per_class)
    seeds = torch.arange(FIRST_SEED, FIRST_SEED + len(labels))
    batches = zip(labels.split(BATCH), seeds.split(BATCH), strict=True)
    pictures = torch.cat(
        [
            sample(source.transformer, source.scheduler, y.tolist(), s.tolist(), steps=steps, guidance=guidance)
            for y, s in tqdm(batches, desc="recognition", unit="batch", total=-(-len(labels) // BATCH))
        ]
    )
    by_class = {
        name: accuracy(classifier, pictures[labels == index], labels[labels == index])
        for index, name in enumerate(fashion_mnist.CLASS_NAMES)
    }
    return dict(
        recognised=accuracy(classifier, pictures, labels),
        samples=len(labels),
        steps=steps,
        guidance=guidance,
        first_seed=FIRST_SEED,
        by_class=by_class,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIRECTORY, help="default: the embedded model")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    result = recognition(args.model, args.per_class, args.steps, args.guidance)
    (args.model / "recognition.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['recognised']:.1%} of {result['samples']} samples recognised")


if __name__ == "__main__":
    main()
