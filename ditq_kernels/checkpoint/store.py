"""Quantized models and pipelines to and from a directory: as the library that they come from writes it, or
``ditq.json`` (the manifest) and ``model.safetensors``. No pickles.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files import written_whole
from ..layer.linear import QuantLinear
from ..model import hosts
from ..model.conversion import Places, quantized_layers
from ..model.planning import obstacle_to
from ..model.wrappers import bare
from .adapters import load_adapters, save_adapters, stored_beside, without_adapters
from .manifest import (
    MANIFEST_FILE,
    PROGRESS_BYTES,
    TENSOR_FILE,
    CheckpointError,
    LayerRecord,
    Manifest,
    model_config,
    sha256,
)

if TYPE_CHECKING:
    from safetensors import safe_open

_FILE_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}  # as safetensors calls them


def save(model: Any, directory: str | os.PathLike) -> None:
    """Write the quantized ``model``, or a pipeline that holds one.

    What comes from diffusers or transformers is written as these libraries do, so that they load it as well (once
    ``ditq_kernels.integrations.diffusers`` is imported); of other models, every parameter and buffer, those that a
    state dict leaves out included. Adapters that are attached and not merged are stored beside the weights, and
    :func:`load` brings them back. The directory appears whole or not at all.

    Raises:
        FileExistsError: if ``directory`` is there already, unless it is an empty directory.
        CheckpointError: (a ValueError) if there is no quantized layer, or a tensor without data.
    """
    directory = Path(directory).resolve()
    _check_free(directory)
    parts = models_in(model)
    whole = parts.get("", model)
    if isinstance(whole, QuantLinear) or not any(quantized_layers(part) for part in parts.values()):
        raise CheckpointError(
            f"{type(model).__name__} holds no quantized layers to save; run ditq.quantize on it first"
        )
    for name, part in parts.items():
        _check_data(name, part)
    with stored_beside(parts.values()), written_whole(directory) as unfinished:
        with without_adapters(*parts.values()), _bare_parts(model, parts):
            if hosts.host_of(whole) is None:
                _save_tensors(whole, unfinished)
            else:
                whole.save_pretrained(str(unfinished))
        for name, part in parts.items():
            save_adapters(part, unfinished / name)
        _check_free(directory)
        if directory.is_dir():
            directory.rmdir()  # an empty one; not every system renames over it


def models_in(model: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by the component's name; a model itself, by the name ""."""
    if isinstance(model, nn.Module):
        return {"": bare(model)}
    parts = getattr(model, "components", {})
    return {name: bare(part) for name, part in parts.items() if isinstance(part, nn.Module)}


@contextlib.contextmanager
def _bare_parts(pipeline: Any, parts: dict[str, nn.Module]) -> Iterator[None]:
    """``pipeline`` holds models themselves in place of what others have put around them, which diffusers would leave
    out, until the end of the ``with`` block.
    """
    wrapped = {
        name: getattr(pipeline, name) for name, part in parts.items() if name and getattr(pipeline, name) is not part
    }
    try:
        for name in wrapped:
            setattr(pipeline, name, parts[name])
        yield
    finally:
        for name, part in wrapped.items():
            setattr(pipeline, name, part)


def _check_data(component: str, model: nn.Module) -> None:
    for name, _, _, tensor, _ in _slots(model):
        if tensor.is_meta:
            full = f"{component}.{name}" if component else name
            raise CheckpointError(f"{full} is on the meta device and has no data; disable offloading before saving")
    for module in model.modules():
        if hosts.is_on_disk(module):
            raise CheckpointError(
                f"the {type(model).__name__} is offloaded to files and has no data; disable offloading before saving"
            )


def _save_tensors(model: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    tensors, aliases = _distinct_tensors(model)
    directory.mkdir(parents=True)
    file = directory / TENSOR_FILE
    save_file(tensors, file, metadata={"format": "pt"})
    Manifest(
        written_by=_version(),
        model_class=type(model).__name__,
        config=model_config(model),
        layers={
            name: LayerRecord.of(module)
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, QuantLinear)
        },
        non_persistent_buffers=sorted(_non_persistent(model)),
        aliases=aliases,
        tensor_bytes=file.stat().st_size,
        tensor_sha256=sha256(file),
    ).write(directory)


def load(directory: str | os.PathLike, device: torch.device | str | None = None, model: nn.Module | None = None) -> Any:
    """The model, in eval mode, or pipeline that :func:`save`, ``ditq quantize`` or diffusers wrote, each part in its
    own dtype; 16-bit weights of its quantized layers are never made.

    Args:
        directory: or a name on the hub, of which only what is needed is downloaded.
        device: where the tensors go; None: the CPU.
        model: for models that neither diffusers nor transformers can build: an instance with plain ``nn.Linear``
            layers, best made under ``torch.device("meta")``. It is filled in place and returned; its own values are
            dropped.

    Raises:
        CheckpointError: (a ValueError) for a directory that is no checkpoint, one written by a newer version, a file
            that is not as it was saved, and tensors that do not fit the model. ``model`` is then as it was.
        ImportError: if the checkpoint needs diffusers, which is not installed.
    """
    device = _checked(device)
    if model is None and not (Path(directory) / MANIFEST_FILE).is_file():
        return _load_hosted(directory, device)
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    manifest = Manifest.read(directory)
    quantized = {name: record.empty_layer(name) for name, record in manifest.layers.items()}
    path = directory / TENSOR_FILE
    manifest.check_tensor_file(path)
    if model is None:
        model = _build(manifest, directory)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            stored = set(file.keys())
            _check_fit(model, quantized, manifest, {name: file.get_slice(name) for name in stored})
            _replace(model, quantized)
            _fill(model, file, manifest.aliases, progress=manifest.tensor_bytes >= PROGRESS_BYTES)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _check_complete(model)
    hosts.tell(model)
    load_adapters(model, directory)
    return model.eval()


def _load_hosted(directory: str | os.PathLike, device: torch.device) -> Any:
    try:
        found = importlib.import_module(hosts.DIRECTORIES).load(directory)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    return found.to(device)


def _checked(device: torch.device | str | None) -> torch.device:
    device = torch.device(device or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{device}" is asked for, and PyTorch finds no GPU here; load to the CPU')
    return device


def _version() -> str:
    from .. import __version__  # the package's root imports this file

    return __version__


def _check_free(directory: Path) -> None:
    there = os.path.lexists(directory)
    if there and not (directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already; choose another directory, or remove it")


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor, bool]]:
    """(full name, module, name in it, tensor, whether it is a parameter), of every place that holds a tensor."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf, tensor, is_parameter


def _non_persistent(model: nn.Module) -> set[str]:
    return {name for name, module, leaf, _, _ in _slots(model) if leaf in module._non_persistent_buffers_set}


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by name, aliases): each tensor once, and the further names of those that have several."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple, str] = {}
    storages: set[tuple] = set()
    for name, _, _, tensor, _ in _slots(model):
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and view in first_name:
            aliases[name] = first_name[view]
            continue
        first_name[view] = name
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        # safetensors refuses tensors that overlap in memory: another view of stored memory is stored as a copy.
        copied = storage in storages or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        storages.add(storage)
        tensors[name] = tensor.detach().contiguous().clone() if copied else tensor.detach().contiguous()
    return tensors, aliases


def _build(manifest: Manifest, directory: Path) -> nn.Module:
    """The model's skeleton on the meta device; only model classes that diffusers itself exports are built."""
    name = manifest.model_class
    by_hand = f"build a {name} yourself and pass it: ditq.load({str(directory)!r}, model=...)"
    if manifest.config is None:
        raise CheckpointError(f"the checkpoint cannot say how its {name} is built; {by_hand}")
    import diffusers

    cls = getattr(diffusers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise CheckpointError(f"diffusers {diffusers.__version__} has no model class {name}; {by_hand}")
    with torch.device("meta"):
        return cls.from_config(manifest.config)


def _check_fit(model: nn.Module, quantized: dict[str, QuantLinear], manifest: Manifest, stored: dict) -> None:
    """CheckpointError unless the file holds exactly the tensors that ``model`` will have; touches nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in quantized.items():
        plain = modules.get(name)
        if not isinstance(plain, nn.Linear) or isinstance(plain, QuantLinear) or obstacle_to(plain):
            found = "nothing" if plain is None else f"a {type(plain).__name__}"
            raise CheckpointError(f"{name} must be a plain nn.Linear in the model that is filled, found {found}")
        if (plain.in_features, plain.out_features) != (layer.in_features, layer.out_features):
            raise CheckpointError(
                f"{name} is {plain.in_features} -> {plain.out_features} in the model and "
                f"{layer.in_features} -> {layer.out_features} in the checkpoint"
            )
    expected = {name: tensor for name, _, _, tensor, _ in _slots(model) if name.rpartition(".")[0] not in quantized} | {
        f"{name}.{leaf}": part for name, layer in quantized.items() for leaf, part in layer.named_parameters()
    }
    for alias, target in manifest.aliases.items():
        if target not in stored or alias in stored:
            raise CheckpointError(f"the manifest is damaged: it calls {alias} another name of {target}")
    slices = stored | {alias: stored[target] for alias, target in manifest.aliases.items()}
    for what, names in (("lacks", expected.keys() - slices.keys()), ("holds", slices.keys() - expected.keys())):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            clause = "" if what == "lacks" else ", which the model does not have"
            raise CheckpointError(f"the checkpoint {what} {min(names)}{rest}{clause}")
    for name, tensor in expected.items():
        shape, dtype = list(slices[name].get_shape()), slices[name].get_dtype()
        if shape != list(tensor.shape):
            raise CheckpointError(f"{name} is {shape} in the checkpoint and {list(tensor.shape)} in the model")
        owner, _, leaf = name.rpartition(".")
        if owner in quantized and leaf != "bias" and dtype != _FILE_DTYPES[tensor.dtype]:
            raise CheckpointError(f"{name} is {dtype} in the checkpoint; it must be {_FILE_DTYPES[tensor.dtype]}")


def _replace(model: nn.Module, quantized: dict[str, QuantLinear]) -> None:
    places = Places(model)
    for name, layer in quantized.items():
        plain = model.get_submodule(name)
        if not isinstance(plain, QuantLinear):  # a module with two names was replaced under both
            places.replace(plain, layer)


def _fill(model: nn.Module, file: safe_open, aliases: dict[str, str], *, progress: bool) -> None:
    """Put the file's tensors into their places, of the dtype in which they were saved; aliases share one tensor."""
    from tqdm.auto import tqdm

    parameters: dict[str, nn.Parameter] = {}
    for name, module, leaf, placeholder, is_parameter in tqdm(
        list(_slots(model)), desc="load", unit="tensor", leave=False, disable=not progress
    ):
        source = aliases.get(name, name)
        if source not in parameters:
            tensor = file.get_tensor(source)
            trainable = placeholder.requires_grad and tensor.is_floating_point()
            kind = type(placeholder) if is_parameter else nn.Parameter
            parameters[source] = kind(tensor, requires_grad=trainable)
        if is_parameter:
            module._parameters[leaf] = parameters[source]
        else:
            module._buffers[leaf] = parameters[source].data


def _check_complete(model: nn.Module) -> None:
    """CheckpointError if a tensor is left without data: one that is neither parameter nor buffer, so was not saved."""
    for prefix, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for leaf, tensor in held.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                name = f"{prefix}.{leaf}" if prefix else leaf
                raise CheckpointError(
                    f"{name} is neither parameter nor buffer, so it was not saved, and was not computed; "
                    "pass model= built on a real device"
                )
