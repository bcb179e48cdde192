"""What every experiment is made in: the embedded model, the pictures it is judged by, calibrations, and records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...evaluation.metrics import difference
from ...evaluation.samples import fingerprint
from ...integrations.sampling import default_scheduler, sample
from ...integrations.source import load_source
from ...layer.linear import QuantLinear
from ...model.calibration import DEFAULT_PICTURES, DEFAULT_STEP, Calibration, calibrate
from ...model.chosen_steps import StepChoice
from ...model.conversion import quantized_layers
from ...model.planning import Plan, plan
from .. import MODEL_DIRECTORY
from .records import Records

CALIBRATION_SEED = 50_000_000  # far from the pictures' seeds
SEEDS_BETWEEN_SETS = 1000


@dataclass(frozen=True)
class Protocol:
    """What is drawn of every variant: ``pictures`` classes in turn, seeds from 0 on, fp32."""

    pictures: int = 40
    steps: int = 20
    guidance: float = 2.0
    calibration_pictures: int = DEFAULT_PICTURES


@dataclass(frozen=True)
class Case:
    """One variant.

    Attributes:
        facts: what it is, as plain values that together occur once in an experiment.
        build: makes its model.
        noise: whether its weights stand for the original's, so that their noise can be measured.
        protocol: another one than the experiment's.
        first_seed: of the pictures.
    """

    facts: dict[str, Any]
    build: Callable[[], nn.Module]
    noise: bool = True
    protocol: Protocol | None = None
    first_seed: int = 0


@dataclass
class Lab:
    """The embedded model in fp32, and everything that is drawn or calibrated of it."""

    protocol: Protocol
    directory: Path = MODEL_DIRECTORY

    def __post_init__(self) -> None:
        source = load_source(self.directory, device="cpu")
        self.model: nn.Module = source.transformer.float().eval()
        self.scheduler = source.scheduler or default_scheduler()
        self.calibration = lru_cache(maxsize=16)(self._calibration)
        self._original = lru_cache(maxsize=None)(lambda protocol: self.draw(self.model, protocol))

    def draw(self, model: nn.Module, protocol: Protocol | None = None, first_seed: int = 0) -> torch.Tensor:
        """fp32 [pictures, C, H, W], drawn by ``model``."""
        protocol = protocol or self.protocol
        classes = self.model.config.num_embeds_ada_norm
        return sample(
            model,
            self.scheduler,
            [index % classes for index in range(protocol.pictures)],
            [first_seed + index for index in range(protocol.pictures)],
            steps=protocol.steps,
            guidance=protocol.guidance,
            progress=False,
        )

    def _calibration(
        self,
        step: StepChoice = DEFAULT_STEP,
        moments: bool = False,
        percentile: float | None = None,
        which: int = 0,
        pictures: int | None = None,
        steps: int | None = None,
    ) -> Calibration:
        """From a fraction of the run, several, or "all" of its steps, on the calibration pictures of set ``which``;
        ``pictures`` of them, and ``steps`` in the run, if they are not the protocol's.
        """
        protocol = replace(
            self.protocol,
            pictures=pictures or self.protocol.calibration_pictures,
            steps=steps or self.protocol.steps,
        )
        return calibrate(
            self.model,
            lambda: self.draw(self.model, protocol, CALIBRATION_SEED + which * SEEDS_BETWEEN_SETS),
            step,
            percentile=percentile,
            moments=moments,
        )

    def copy(self) -> nn.Module:
        """The original, to be changed."""
        return copy.deepcopy(self.model)

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The original's linear layers that its recipe quantizes."""
        return {entry.name: self.model.get_submodule(entry.name) for entry in plan(self.model, "w4a8").quantized()}

    def with_weights(self, weight_of: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
        """A copy whose quantized layers stay in floating point and hold ``weight_of(name, weight)``."""
        model = self.copy()
        for name in self.layers:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(weight_of(name, layer.weight.detach()), requires_grad=False)
        return model

    def noise(self, model: nn.Module) -> dict[str, float]:
        """Averages over the quantized layers. Signal-to-noise ratios in dB: of the weights, and of what they make of
        the inputs of a whole run. And the gain of these outputs less one: what they are along the original's.
        """
        moments = self.calibration("all", moments=True).moments
        weights, outputs, gains = [], [], []
        for name, layer in self.layers.items():
            changed = model.get_submodule(name)
            exact = layer.weight.detach().double()
            error = exact - (changed.dequantized_weight() if isinstance(changed, QuantLinear) else changed.weight)
            if not bool(error.any()):
                continue
            moment = moments[name].double()
            weights.append(10 * torch.log10(exact.square().sum() / error.square().sum()))
            signal = (exact @ moment * exact).sum()
            outputs.append(10 * torch.log10(signal / (error @ moment * error).sum()))
            gains.append(-(exact @ moment * error).sum() / signal)
        if not weights:
            return {}
        found = dict(weight_snr_db=weights, output_snr_db=outputs, output_gain=gains)
        return {name: float(sum(values) / len(values)) for name, values in found.items()}

    def measure(self, case: Case) -> dict[str, Any]:
        """The record of ``case``: its facts, and what its pictures came out as."""
        model = case.build()
        protocol = case.protocol or self.protocol
        with torch.no_grad():
            found = difference(self.draw(model, protocol, case.first_seed), self._original(protocol))
            noise = self.noise(model) if case.noise else {}
        layers = quantized_layers(model).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        stored = {"bits_per_weight": 8 * sum(layer.nbytes for layer in layers) / weights} if weights else {}
        return {
            **stored,  # what the case says of itself counts
            **case.facts,
            **noise,
            "psnr_db": [round(value, 3) for value in found.psnr_db.tolist()],
            "ssim": float(found.ssim.mean()),
            "relative_l2": found.relative_l2,
        }

    def carry_out(self, cases: Iterable[Case], records: Records) -> None:
        """Measure those of ``cases`` that ``records`` lacks, saving each as it comes, behind a progress bar."""
        from tqdm import tqdm

        weights = sum(layer.weight.numel() for layer in self.layers.values())
        records.begin(asdict(self.protocol), weights, fingerprint(self.model, self.scheduler))
        for case in tqdm(list(cases), desc=records.path.stem, unit="variant"):
            if records.find(**case.facts) is None:
                records.add(self.measure(case))
        records.finish()


def bits_of_all_layers(chosen: Plan) -> float:
    """Bits per weight over all linear layers, those that ``chosen`` keeps counted with 16."""
    return sum(entry.stored_bits for entry in chosen) / sum(entry.weights for entry in chosen)
