"""From one directory to another: a model or pipeline quantized, and everything else that stood beside it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from ..checkpoint import store
from ..checkpoint.manifest import MANIFEST_FILE
from ..files import written_whole
from ..layer.formats import Scheme
from ..model.calibration import Calibration
from ..model.pipelines import DENOISER, ENCODER, scheme_of
from ..model.planning import Plan, plan
from .config import DitqConfig
from .directories import CONFIG_FILE, PIPELINE_FILE, class_of, load_model, read_json, skeleton
from .source import LABEL_FILE

BESIDE = ("scheduler", LABEL_FILE)  # of a bare model


def model_directories(path: Path, components: Collection[str] | None = None) -> dict[str, Path]:
    """The directories of what is quantized: of a pipeline by the component's name, all denoisers and text encoders or
    those of ``components``; of a bare model by "".

    Raises:
        ValueError: if there is no model, one is quantized already, or a component is not in the pipeline.
    """
    if (path / PIPELINE_FILE).is_file():
        index = read_json(path / PIPELINE_FILE)
        models = [name for name in index if _holds_model(path / name)]
        chosen = components or [name for name in models if re.fullmatch(f"{DENOISER}|{ENCODER}", name)]
        for name in chosen:
            if name not in models:
                raise ValueError(f"the pipeline in {path} has no model {name!r}; it has {', '.join(models)}")
        if not chosen:
            raise ValueError(f"the pipeline in {path} has neither a transformer nor a text encoder to quantize")
        found = {name: path / name for name in chosen}
    elif components:
        raise ValueError(f"components name the models of a pipeline, and {path} holds no {PIPELINE_FILE}")
    elif _holds_model(path):
        found = {"": path}
    else:
        raise ValueError(
            f"{path} holds neither {PIPELINE_FILE} nor {CONFIG_FILE} nor {MANIFEST_FILE}: no model is there"
        )
    for directory in found.values():
        _check_unquantized(directory)
    return found


def _holds_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (CONFIG_FILE, MANIFEST_FILE))


def _check_unquantized(directory: Path) -> None:
    stored = {} if (directory / MANIFEST_FILE).is_file() else read_json(directory / CONFIG_FILE)
    method = "ditq" if (directory / MANIFEST_FILE).is_file() else (stored.get("quantization_config") or {})
    if method:
        by = method if isinstance(method, str) else method.get("quant_method", "another library")
        raise ValueError(f"{directory} is quantized already, by {by}; quantize the 16-bit model it was made of")


def plans_of(
    directories: Mapping[str, Path], scheme: Scheme, calibrations: Mapping[str, Calibration] | None = None
) -> dict[str, Plan]:
    """A plan of each model, made without its weights.

    Raises:
        ValueError: for a model of which nothing would be quantized.
    """
    calibrations = calibrations or {}
    plans = {
        name: plan(skeleton(path), scheme_of(name, scheme), calibration=calibrations.get(name))
        for name, path in directories.items()
    }
    for name, path in directories.items():
        if not plans[name].quantized():
            raise ValueError(f"of the {class_of(path).__name__} in {path}, {scheme} would quantize nothing")
    return plans


def check_target(path: Path, directory: Path) -> None:
    """Raise unless :func:`write` may write ``directory``: it must be new, and not inside a pipeline's."""
    if os.path.lexists(directory):
        raise FileExistsError(f"{directory} exists already; choose another directory, or remove it")
    if (path / PIPELINE_FILE).is_file() and path.resolve() in directory.resolve().parents:
        raise ValueError(f"{directory} would stand inside {path}, which is copied; choose one outside it")


def write(path: Path, directory: Path, models: Mapping[str, nn.Module | Plan], clip: float | str | None = None) -> None:
    """Write ``directory``, which appears whole or not at all: quantized ``models``, or what their plans make of those
    in ``path``, loaded one at a time and quantized meanwhile; and of what stood beside them, everything that the
    pipeline's index names, or a bare model's scheduler and names of classes.

    Raises:
        FileExistsError, ValueError: as :func:`check_target` does, and if a model cannot be loaded.
    """
    check_target(path, directory)
    with written_whole(directory) as unfinished:
        unfinished.mkdir(parents=True)
        for name, model in models.items():
            if isinstance(model, Plan):
                model = load_model(path / name, DitqConfig(plan=model, clip=clip))
            store.save(model, unfinished / name)
        index = read_json(path / PIPELINE_FILE) if (path / PIPELINE_FILE).is_file() else {}
        for name in (*index, PIPELINE_FILE) if index else BESIDE:
            source = path / name
            if name not in models and source.is_dir():
                shutil.copytree(source, unfinished / name)
            elif name not in models and source.is_file():
                shutil.copy2(source, unfinished)
