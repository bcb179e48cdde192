"""Models and pipelines of diffusers and transformers, quantized or not, from directories and from the hub, each part in
the dtype in which it is stored.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoint import store
from ..checkpoint.adapters import load_adapters
from ..checkpoint.manifest import MANIFEST_FILE
from ..model.hosts import HOSTS
from .config import DitqConfig
from .loading import AdaptersLeftOut

PIPELINE_FILE = "model_index.json"
CONFIG_FILE = "config.json"
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors calls them


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value in the file at ``path``, which must be a ``kind``; ValueError otherwise."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__} where a {kind.__name__} belongs")
    return content


def first_line(error: Exception) -> str:
    """Of an error's message; its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def variant_of(directory: Path) -> str | None:
    """The one variant that a model is stored in, such as "fp16" of ``model.fp16.safetensors``; None if there is a plain
    file, which is then loaded, or several variants.
    """
    parts = [path.name.split(".")[1:-1] for path in directory.glob("*.safetensors")]
    variants = {middle[0].partition("-")[0] for middle in parts if middle}
    return variants.pop() if len(variants) == 1 and all(parts) else None


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of most of what a model's files hold that is not quantized: diffusers' loader has no "as stored"."""
    config = read_json(directory / CONFIG_FILE)
    quantized = config.get("quantization_config") or {}
    if isinstance(getattr(torch, str(quantized.get("dtype")), None), torch.dtype):
        return getattr(torch, quantized["dtype"])
    elements: Counter[torch.dtype] = Counter()
    variant = variant_of(directory)
    for path in directory.glob("*.safetensors"):
        if path.name.count(".") > 1 and variant is None:
            continue  # a variant that is not loaded
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                    part = file.get_slice(name)
                    elements[STORED_DTYPES.get(part.get_dtype(), torch.float32)] += math.prod(part.get_shape())
        except (OSError, SafetensorError):
            break  # the loader says what is wrong with it
    return elements.most_common(1)[0][0] if elements else torch.float32


def local(source: str | os.PathLike) -> Path:
    """The directory ``source``, or one with what the hub has under that name: of a pipeline, only what its index names.

    Raises:
        FileNotFoundError: if ``source`` is no directory and the hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(f"{source} is not a directory with a model or pipeline")
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            hf_hub_download(str(source), PIPELINE_FILE)
        except EntryNotFoundError:
            return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        return Path(DiffusionPipeline.download(str(source)))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FileNotFoundError(
            f"{source} is not a directory here, and the hub did not give it: {first_line(error)}"
        ) from None


def class_of(directory: Path) -> type[nn.Module]:
    """The class of the model in ``directory``, one of diffusers' or transformers' own.

    Raises:
        ValueError: if its ``config.json`` cannot be read, or names none.
    """
    config = read_json(directory / CONFIG_FILE)
    importlib.import_module(HOSTS["diffusers" if "_class_name" in config else "transformers"])
    if "_class_name" in config:
        import diffusers as library
        from diffusers import ModelMixin as base

        name = str(config["_class_name"])
    else:
        import transformers as library
        from transformers import PreTrainedModel as base

        name = str(next(iter(config.get("architectures") or ()), ""))
    cls = getattr(library, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"{directory / CONFIG_FILE} names no model class of {library.__name__} {library.__version__}: {name!r}"
        )
    return cls


def skeleton(directory: Path) -> nn.Module:
    """The model in ``directory`` on the meta device, which costs no memory: its layers and no weights."""
    cls = class_of(directory)
    with torch.device("meta"):
        if hasattr(cls, "from_config"):
            return cls.from_config(cls.load_config(str(directory)))
        return cls(cls.config_class.from_pretrained(str(directory)))


def _reason(error: Exception) -> str:
    missing = importlib.util.find_spec("accelerate") is None
    return first_line(error) + "; diffusers loads with accelerate: pip install accelerate" * missing


def load_model(directory: Path, quantization: DitqConfig | None = None) -> nn.Module:
    """The model in ``directory``, in eval mode, quantized while it is loaded where ``quantization`` says how.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    if (directory / MANIFEST_FILE).exists():
        return store.load(directory)
    cls = class_of(directory)
    how = {} if quantization is None else {"quantization_config": quantization}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdaptersLeftOut)  # they are attached below
            model = cls.from_pretrained(
                str(directory),
                use_safetensors=True,
                variant=variant_of(directory),
                dtype=stored_dtype(directory),
                **how,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{directory} could not be loaded as a {cls.__name__}: {_reason(error)}") from None
    load_adapters(model, directory)
    return model.eval()


def load_pipeline(directory: Path) -> Any:
    """The pipeline in ``directory``; ValueError if there is none that can be loaded."""
    from diffusers import DiffusionPipeline

    importlib.import_module(HOSTS["diffusers"])
    index = read_json(directory / PIPELINE_FILE)
    folders = {name: directory / name for name in index if (directory / name / CONFIG_FILE).is_file()}
    older = {name: directory / name for name in index if (directory / name / MANIFEST_FILE).is_file()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdaptersLeftOut)  # they are attached below
            pipeline = DiffusionPipeline.from_pretrained(
                str(directory),
                dtype={name: stored_dtype(folder) for name, folder in folders.items() if name not in older},
                use_safetensors=True,
                variant=next(filter(None, map(variant_of, folders.values())), None),
                **{name: store.load(folder) for name, folder in older.items()},
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{directory} could not be loaded as a pipeline: {_reason(error)}") from None
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            load_adapters(part, directory / name)
    return pipeline


def load(source: str | os.PathLike) -> Any:
    """The model or pipeline in a directory, or of that name on the hub.

    Raises:
        FileNotFoundError, ValueError: if there is none that can be loaded.
    """
    path = local(source)
    if (path / PIPELINE_FILE).is_file():
        return load_pipeline(path)
    if not any((path / name).is_file() for name in (CONFIG_FILE, MANIFEST_FILE)):
        raise ValueError(
            f"{path} holds neither {PIPELINE_FILE} nor {CONFIG_FILE} nor {MANIFEST_FILE}: no model is there"
        )
    return load_model(path)
