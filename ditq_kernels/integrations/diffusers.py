"""diffusers models and pipelines, and quantized ones of ours, from and to directories.

Importing this is the one import of the package with an effect: diffusers' own ``from_pretrained`` and
``save_pretrained`` know quantized models from then on (``quantization_config=DitqConfig("w4a8_g128")``), and two of its
functions are replaced (:mod:`.patches`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoint import store
from ..checkpoint.manifest import MANIFEST_FILE
from ..files import written_whole
from . import patches
from .config import DitqConfig
from .quantizer import DitqQuantizer, attach, register

__all__ = [
    "DitqConfig",
    "DitqQuantizer",
    "Source",
    "attach",
    "check_target",
    "load_source",
    "save_quantized",
]

register()
patches.apply()

PIPELINE_FILE = "model_index.json"
CONFIG_FILE = "config.json"
PICTURE_CHANNELS = (1, 3)  # a model of other than these samples latents
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors calls them
LABEL_FILE = "class_names.json"  # beside a bare model: a JSON list of its classes' names


@dataclass
class Source:
    """A model to quantize or sample from, and what stands beside it.

    Attributes:
        path: the directory that it was loaded from.
        transformer: the model itself, quantized or not.
        scheduler: the one beside it, or None.
        vae: the autoencoder of a latent model, or None.
        is_pipeline: whether ``path`` is a pipeline's directory, with the model in ``transformer/``.
        labels: class names to indices, where the directory has them.
    """

    path: Path
    transformer: nn.Module
    scheduler: diffusers.SchedulerMixin | None = None
    vae: nn.Module | None = None
    is_pipeline: bool = False
    labels: dict[str, int] = field(default_factory=dict)

    def check_decodable(self) -> None:
        """Raise ValueError if the samples are latents and there is no autoencoder to decode them."""
        channels = self.transformer.config.in_channels
        if self.vae is None and channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"{self.path} samples latents of {channels} channels and has no autoencoder to decode them; "
                "give a pipeline directory, with vae/ beside transformer/"
            )

    @torch.no_grad()
    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures, fp32 [B, C, H, W] in [-1, 1], of what was sampled; ValueError as :meth:`check_decodable`."""
        self.check_decodable()
        if self.vae is None:
            return samples
        latents = samples.to(device=self.vae.device, dtype=self.vae.dtype)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float().cpu()


def _read_json(path: Path, kind: type = dict) -> dict | list:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__} where a {kind.__name__} belongs")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _resolve(source: str | os.PathLike) -> Path:
    """The local directory of ``source``; a hub name is downloaded."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(f"{source} is not a directory with a diffusers model or pipeline")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx"]))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FileNotFoundError(
            f"{source} is not a directory here, and the hub did not give it: {_first_line(error)}"
        ) from None


def _stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of most of a model's weights, from the headers of its files: diffusers' loader has no "as stored"."""
    elements: Counter[torch.dtype] = Counter()
    for path in directory.glob("diffusion_pytorch_model*.safetensors"):
        if path.name.count(".") > 1:
            continue  # a variant, such as .fp16.safetensors, that is not loaded
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                    part = file.get_slice(name)
                    elements[STORED_DTYPES.get(part.get_dtype(), torch.float32)] += math.prod(part.get_shape())
        except (OSError, SafetensorError):
            break  # the loader says what is wrong with it
    return elements.most_common(1)[0][0] if elements else torch.float32


def _load_transformer(directory: Path, device: torch.device | str | None) -> nn.Module:
    if (directory / MANIFEST_FILE).exists():
        return store.load(directory, device)
    name = str(_read_json(directory / CONFIG_FILE).get("_class_name", ""))
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{directory / CONFIG_FILE} names no model class of diffusers {diffusers.__version__}: {name!r}"
        )
    try:
        model = cls.from_pretrained(directory, torch_dtype=_stored_dtype(directory), use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{directory} could not be loaded as a {name}: {_first_line(error)}") from None
    return model.to(device).eval() if device is not None else model.eval()


def _load_scheduler(directory: Path) -> diffusers.SchedulerMixin | None:
    if not directory.is_dir():
        return None
    name = str(_read_json(directory / "scheduler_config.json").get("_class_name", ""))
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"{directory} names no scheduler class of diffusers {diffusers.__version__}: {name!r}")
    return cls.from_pretrained(directory)


def load_source(
    source: str | os.PathLike, *, device: torch.device | str | None = None, with_vae: bool = False
) -> Source:
    """Load a pipeline directory, a bare model's, a quantized one of either kind, or a model from the hub.

    Weights keep the dtype in which they are stored. The autoencoder is loaded only ``with_vae``.

    Raises:
        FileNotFoundError: if ``source`` is no directory and the hub does not give it.
        ValueError: if the directory holds no model that can be loaded.
    """
    path = _resolve(source)
    is_pipeline = (path / PIPELINE_FILE).exists()
    if not is_pipeline and not any((path / name).exists() for name in (MANIFEST_FILE, CONFIG_FILE)):
        raise ValueError(
            f"{path} holds neither {PIPELINE_FILE} nor {CONFIG_FILE} nor {MANIFEST_FILE}: no model is there"
        )
    labels: dict[str, int] = {}
    vae = None
    if is_pipeline:
        if not (path / "transformer").is_dir():
            raise ValueError(f"the pipeline in {path} has no transformer/: it is not a diffusion transformer's")
        for index, names in _read_json(path / PIPELINE_FILE).get("id2label", {}).items():
            labels.update({name.strip(): int(index) for name in names.split(",")})
        if with_vae and (path / "vae").is_dir():
            vae = diffusers.AutoencoderKL.from_pretrained(path / "vae").eval()
            vae = vae.to(device) if device is not None else vae
    elif (path / LABEL_FILE).exists():
        labels = {name: index for index, name in enumerate(_read_json(path / LABEL_FILE, list))}
    transformer = _load_transformer(path / "transformer" if is_pipeline else path, device)
    return Source(path, transformer, _load_scheduler(path / "scheduler"), vae, is_pipeline, labels)


def check_target(source: Source, directory: Path) -> None:
    """Raise unless :func:`save_quantized` may write ``directory``: it must be new, and not inside a pipeline's."""
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; choose another directory, or remove it")
    if source.is_pipeline and source.path.resolve() in directory.resolve().parents:
        raise ValueError(f"{directory} would stand inside {source.path}, which is copied; choose one outside it")


def save_quantized(source: Source, directory: str | os.PathLike) -> None:
    """Write the quantized ``source.transformer`` to ``directory`` with everything that stood beside the original.

    The directory appears whole or not at all.

    Raises:
        FileExistsError: if ``directory`` exists.
        ValueError: if it would stand inside the pipeline's directory.
    """
    directory = Path(directory)
    check_target(source, directory)
    with written_whole(directory) as unfinished:
        if source.is_pipeline:
            shutil.copytree(source.path, unfinished, ignore=lambda _, names: {"transformer"} & set(names))
            store.save(source.transformer, unfinished / "transformer")
        else:
            store.save(source.transformer, unfinished)
            if (source.path / "scheduler").is_dir():
                shutil.copytree(source.path / "scheduler", unfinished / "scheduler")
            if (source.path / LABEL_FILE).exists():
                shutil.copy2(source.path / LABEL_FILE, unfinished)
