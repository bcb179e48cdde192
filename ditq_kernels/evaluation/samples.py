"""Many samples of one model, drawn in batches that lie on disk: what was drawn before an interruption is not drawn
again, and several processes share the batches.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files import written_whole
from ..integrations.pictures import to_levels
from ..model.conversion import quantized_layers

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SETTINGS_FILE = "settings.json"
MEANING = {"fingerprint": " (weights, scheduler, prompts or sizes are others)"}


@dataclass(frozen=True)
class Request:
    """What is drawn. Every picture has a seed of its own and does not depend on who draws which batch.

    Attributes:
        model: what the model is, in words: its source, scheme and rounding.
        fingerprint: of its weights, its scheduler and, if it is given prompts, of all that its pictures depend on
            besides, so that samples of a model that has changed since are not taken for its own.
        classes: classes, or prompts, taken in turn.
        count: pictures.
        first_seed: of the first picture; the others follow.
        steps, guidance: of the sampler; None: the pipeline's own.
        batch: pictures drawn at once.
    """

    model: str
    fingerprint: str
    classes: int
    count: int
    first_seed: int
    steps: int
    guidance: float | None
    batch: int

    @property
    def labels(self) -> list[int]:
        return [index % self.classes for index in range(self.count)]

    @property
    def seeds(self) -> list[int]:
        return [self.first_seed + index for index in range(self.count)]

    def batches(self) -> Iterator[slice]:
        """Slices of the pictures, one a batch."""
        return (slice(first, min(first + self.batch, self.count)) for first in range(0, self.count, self.batch))

    def path(self, directory: Path, batch: slice) -> Path:
        """The file of one batch."""
        return directory / f"{batch.start:07d}.safetensors"


def digest(about: Any, *models: nn.Module) -> str:
    """Of plain values, and of all that ``models`` hold, bit for bit."""
    found = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8)
    for model in models:
        for name, value in model.state_dict().items():
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(model: nn.Module, scheduler: SchedulerMixin, beside: str | None = None) -> str:
    """A digest of all that ``model`` holds, bit for bit, of how it and ``scheduler`` are configured, and of what else
    decides the pictures, itself a digest.
    """
    from ..integrations.samplers import settings_of

    settings = [type(model).__name__, type(scheduler).__name__, [settings_of(model), settings_of(scheduler)]]
    settings += [{name: layer.scheme.name for name, layer in quantized_layers(model).items()}]
    return digest([*settings, beside] if beside else settings, model)


def check(request: Request, directory: Path) -> bool:
    """Whether ``directory`` holds samples of ``request``; it may lack some or all.

    Raises:
        ValueError: if it holds samples of something else, naming the first difference.
    """
    path = directory / SETTINGS_FILE
    wanted = asdict(request)
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{directory} holds samples with {name} = {found.get(name)}, and {value} is asked for"
                    f"{MEANING.get(name, '')}; choose another directory, or remove this one"
                )
    return path.exists()


def _begin(request: Request, directory: Path) -> None:
    """Note in ``directory`` what it holds samples of; ValueError as :func:`check`."""
    if check(request, directory):
        return
    directory.mkdir(parents=True, exist_ok=True)
    # By whichever process comes last; all write the same.
    with written_whole(directory / SETTINGS_FILE) as unfinished:
        unfinished.write_text(json.dumps(asdict(request), indent=1) + "\n")


def missing(request: Request, directory: Path, process: int = 0, processes: int = 1) -> list[slice]:
    """The batches of this process's share that ``directory`` lacks."""
    mine = list(request.batches())[process::processes]
    return [batch for batch in mine if not request.path(directory, batch).exists()]


def draw(
    request: Request,
    sample: Callable[[list[int], list[int]], torch.Tensor],
    directory: Path,
    *,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Draw those batches of ``request`` that ``directory`` lacks; how many were drawn. Each file appears whole or not
    at all.

    Args:
        sample: fp32 [B, C, H, W] on the CPU, of labels and seeds.
        process, processes: this one, of how many that share the batches.

    Raises:
        ValueError: if ``directory`` holds samples of another request.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    _begin(request, directory)
    wanted = missing(request, directory, process, processes)
    labels, seeds = request.labels, request.seeds
    for batch in tqdm(wanted, desc=directory.name, unit="batch", file=sys.stderr, leave=False, disable=not progress):
        drawn = dict(samples=sample(labels[batch], seeds[batch]), labels=torch.tensor(labels[batch]))
        with written_whole(request.path(directory, batch)) as unfinished:
            save_file(drawn, unfinished, metadata={"process": f"{process} of {processes}"})
    return len(wanted)


def batches(request: Request, directory: Path) -> Iterator[torch.Tensor]:
    """fp32 [B, C, H, W]: the samples of ``request`` in order, as they were drawn.

    Raises:
        ValueError: if some are missing, or ``directory`` holds those of another request.
    """
    from safetensors.torch import load_file

    check(request, directory)
    paths = [request.path(directory, batch) for batch in request.batches()]
    lacking = [path.name for path in paths if not path.exists()]
    if lacking:
        raise ValueError(f"{directory} lacks {len(lacking)} of {len(paths)} batches, {lacking[0]} the first; draw them")
    return (load_file(path)["samples"] for path in paths)


def load(request: Request, directory: Path) -> torch.Tensor:
    """All of :func:`batches` as one tensor."""
    return torch.cat(list(batches(request, directory)))


def save_for_other_evaluators(batches: Iterable[torch.Tensor], labels: list[int], path: Path) -> None:
    """Write an ``.npz`` that guided-diffusion's evaluator reads: ``arr_0`` uint8 [N, H, W, 3], ``arr_1`` the labels.
    Pictures come in batches [B, 1 or 3, H, W] in [-1, 1]; grey ones are repeated.
    """
    import numpy as np

    levels = torch.cat([to_levels(batch) for batch in batches]).permute(0, 2, 3, 1)
    colours = levels.expand(-1, -1, -1, 3) if levels.shape[-1] == 1 else levels
    with written_whole(path) as unfinished, unfinished.open("wb") as file:  # to a name, NumPy may add a suffix
        np.savez(file, colours.contiguous().numpy(), np.asarray(labels, dtype=np.int64))
