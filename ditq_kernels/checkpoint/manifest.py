"""The manifest of a checkpoint: what ``ditq.json`` says, written and read with care. No tensor passes through here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layer.formats import Scheme
from ..layer.linear import QuantLinear
from ..layer.packing import LAYOUTS

FORMAT = "ditq"
VERSION = 1
MANIFEST_FILE = "ditq.json"
TENSOR_FILE = "model.safetensors"
CHUNK = 1 << 22  # bytes read at a time
PROGRESS_BYTES = 1 << 30  # what takes seconds shows a bar


class CheckpointError(ValueError):
    """A directory that cannot be loaded, or a model that cannot be saved; the message names what is at fault."""


@dataclass(frozen=True)
class LayerRecord:
    """How one quantized layer is stored; ``dtype`` is that of the bias and of :attr:`QuantLinear.weight`."""

    scheme: str
    layout: str
    layout_version: int
    in_features: int
    out_features: int
    bias: bool
    dtype: str

    @classmethod
    def of(cls, layer: QuantLinear) -> LayerRecord:
        layout = LAYOUTS[layer.scheme.weight.layout]
        return cls(
            layer.scheme.name,
            layout.name,
            layout.version,
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            str(layer.dtype).removeprefix("torch."),
        )

    def empty_layer(self, name: str) -> QuantLinear:
        """The layer on the meta device; CheckpointError where this version cannot read it."""
        try:
            scheme = Scheme.parse_for_layer(self.scheme)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        layout = LAYOUTS.get(self.layout)
        if layout is None or layout.name != scheme.weight.layout or layout.version != self.layout_version:
            known = LAYOUTS[scheme.weight.layout]
            raise CheckpointError(
                f"{name} is stored in layout {self.layout} version {self.layout_version}, and this ditq_kernels reads "
                f"{known.name} version {known.version}; upgrade, or quantize the model again"
            )
        dtype = getattr(torch, str(self.dtype), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(f"{name}: the manifest gives it the dtype {self.dtype!r}, which is no floating dtype")
        shape = (self.in_features, self.out_features)
        if not all(isinstance(size, int) and size > 0 for size in shape) or not isinstance(self.bias, bool):
            raise CheckpointError(f"{name}: the manifest is damaged, it gives the layer as {shape}, bias {self.bias!r}")
        return QuantLinear.empty(*shape, scheme, bias=self.bias, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        written_by: the version of ditq_kernels.
        model_class: the name of the model's class.
        config: its constructor's arguments, for models that diffusers can build; else None.
        layers: the quantized layers, by name.
        non_persistent_buffers: names of stored buffers that a state dict would not hold.
        aliases: names of tensors that are the same as another, to the name under which that one is stored.
        tensor_bytes, tensor_sha256: of the tensor file.
    """

    written_by: str
    model_class: str
    config: dict[str, Any] | None
    layers: dict[str, LayerRecord]
    non_persistent_buffers: list[str]
    aliases: dict[str, str]
    tensor_bytes: int
    tensor_sha256: str

    def write(self, directory: Path) -> None:
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (directory / MANIFEST_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises CheckpointError for a directory that is no checkpoint, or one of a newer version."""
        path = directory / MANIFEST_FILE
        if not path.is_file():
            what = f"has no {MANIFEST_FILE}" if directory.is_dir() else "is no directory"
            raise CheckpointError(f"{directory} is not a ditq checkpoint: it {what}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{directory} is not a ditq checkpoint: {MANIFEST_FILE} is no JSON ({error})"
            ) from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise CheckpointError(
                f'{directory} is not a ditq checkpoint: {MANIFEST_FILE} does not say "format": "{FORMAT}"'
            )
        version = record.pop("version", None)
        if isinstance(version, int) and version > VERSION:
            raise CheckpointError(
                f"{directory} was written by a newer ditq_kernels (format {version}); upgrade to load it"
            )
        if version != VERSION:
            raise CheckpointError(f"{path} gives the format version {version!r}; this ditq_kernels reads {VERSION}")
        try:
            layers = {name: LayerRecord(**layer) for name, layer in record.pop("layers").items()}
            manifest = cls(layers=layers, **record)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        manifest._check_kinds(path)
        return manifest

    def _check_kinds(self, path: Path) -> None:
        kinds = {
            "model_class": str,
            "config": (dict, type(None)),
            "non_persistent_buffers": list,
            "aliases": dict,
            "tensor_bytes": int,
            "tensor_sha256": str,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise CheckpointError(f"{path} is damaged: {name} is {getattr(self, name)!r}")

    def check_tensor_file(self, path: Path) -> None:
        """Raises CheckpointError unless ``path`` is, byte for byte, the file that was saved."""
        if not path.is_file():
            raise CheckpointError(f"{path.parent} is incomplete: it has no {path.name}")
        size = path.stat().st_size
        if size != self.tensor_bytes:
            raise CheckpointError(f"{path} has {size} bytes where {self.tensor_bytes} were saved; copy it again")
        if sha256(path) != self.tensor_sha256:
            raise CheckpointError(f"{path} is not the file that was saved (its sha256 differs); copy it again")


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """The public part of a diffusers model's config as plain JSON values; None for other models."""
    if not (hasattr(model, "config") and hasattr(model, "to_json_string")):
        return None
    config = json.loads(model.to_json_string())
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}


def sha256(path: Path) -> str:
    """Of the file at ``path``, in hexadecimal; a bar is shown for a big one."""
    from tqdm.auto import tqdm

    digest, size = hashlib.sha256(), path.stat().st_size
    bar = tqdm(desc="hash", total=size, unit="B", unit_scale=True, leave=False, disable=size < PROGRESS_BYTES)
    with bar, path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
