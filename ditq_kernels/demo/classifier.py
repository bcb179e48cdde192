"""A small convolutional classifier of Fashion-MNIST: judges the pictures that the embedded model draws."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..evaluation.run import Judge

DIRECTORY = Path(__file__).parent / "fashion_classifier"


class FashionClassifier(nn.Module):
    """Pictures [B, 1, 28, 28] in [-1, 1] to logits [B, 10]."""

    FEATURES = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, self.FEATURES, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.FEATURES, 10)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """The averaged last feature map, fp32 [B, 128]."""
        return self.trunk(pictures)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pictures))


def load_classifier(directory: str | Path = DIRECTORY) -> FashionClassifier:
    """The trained classifier, in fp32 and eval mode."""
    classifier = FashionClassifier()
    weights = load_file(Path(directory) / "model.safetensors")
    classifier.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: FashionClassifier, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of ``pictures`` that the classifier gives their label, in batches of 500."""
    hits = [
        (classifier(batch).argmax(1) == wanted).sum()
        for batch, wanted in zip(pictures.split(500), labels.split(500), strict=True)
    ]
    return float(sum(hits)) / len(labels)


def judge_of(model: nn.Module) -> Judge | None:
    """The classifier as a judge of a diffusion transformer's samples; None if they are not pictures that it knows."""
    config = model.config
    if (config.in_channels, config.sample_size, config.num_embeds_ada_norm) != (1, 28, 10):
        return None
    classifier = load_classifier().requires_grad_(False)
    return Judge("fashion classifier", classifier.features, classifier.FEATURES, classifier)
