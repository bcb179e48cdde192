"""Adapters (LoRA and its kin, by peft) of models that are saved and loaded: the model is stored as it is without them,
and they beside it, in peft's own format.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..layer.errors import UnsupportedError
from ..model.wrappers import BASE, ORIGINAL, adapted_layers, own_name, trained_copies

DIRECTORY = "adapters"  # a numbered folder for each: names may be no names of folders
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name for it
STATE_FILE = "state.json"  # their names, which of them act in each layer, and how strongly


@contextlib.contextmanager
def without_adapters(*models: nn.Module) -> Iterator[None]:
    """The layers themselves stand in the models in place of those that adapters are put around, until the end of the
    ``with`` block.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    flags: list[tuple[nn.Module, bool]] = []
    for model in models:
        own = {layer: BASE for layer in adapted_layers(model).values()}
        own |= {copy: ORIGINAL for copy in trained_copies(model).values()}
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child in own:
                    replaced.append((parent, name, child))
                    parent._modules[name] = child._modules[own[child]]
        if own and "_hf_peft_config_loaded" in vars(model):  # transformers would save the adapters alone
            flags.append((model, model._hf_peft_config_loaded))
            model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child
        for model, flag in flags:
            model._hf_peft_config_loaded = flag


def adapters_to_save(model: nn.Module) -> dict[str, Any]:
    """Name to configuration, of the adapters of the bare ``model`` that are not merged into its weights.

    Raises:
        UnsupportedError: for one that trains copies of whole modules.
    """
    for name in trained_copies(model):
        raise UnsupportedError(
            f"an adapter trains a copy of {own_name(name)} (modules_to_save), which is not stored with a quantized "
            "model: save the adapter by itself, and the model without it"
        )
    layers = adapted_layers(model).values()
    merged = {adapter for layer in layers for adapter in layer.merged_adapters}
    configs = getattr(model, "peft_config", {}) if layers else {}
    found = {name: config for name, config in configs.items() if name not in merged}
    for name, config in found.items():
        _check_kind(name, config)
    return found


def _check_kind(name: str, config: Any) -> None:
    """Raise UnsupportedError for a kind of adapter that peft does not put into a model that exists."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or getattr(tuner, "uses_shared_state", False):
        raise UnsupportedError(
            f"{name} is a {config.peft_type.value} adapter, which is not stored with a quantized model: save it by its "
            "own save_pretrained, and the model without it"
        )


_STORED: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def stored_beside(models: Iterable[nn.Module]) -> Iterator[None]:
    """:func:`adapters_beside` knows which adapters are stored with ``models``, until the end of the ``with`` block.

    Raises:
        UnsupportedError: as :func:`adapters_to_save` does.
    """
    names = {model: tuple(adapters_to_save(model)) for model in models}
    _STORED.update(names)
    try:
        yield
    finally:
        for model in names:
            del _STORED[model]


def adapters_beside(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are stored beside ``model``, which is being saved."""
    return _STORED.get(model, ())


def save_adapters(model: nn.Module, directory: Path) -> None:
    """Write :func:`adapters_to_save` of ``model``, if there are any, to folders in ``directory``."""
    configs = adapters_to_save(model)
    if not configs:
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folders = {name: str(number) for number, name in enumerate(configs)}
    for name, config in configs.items():
        folder = directory / DIRECTORY / folders[name]
        config.save_pretrained(str(folder))
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        # Clones: some kinds share tensors among layers.
        save_file({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    layers = {
        own_name(name): {
            # Where one is merged, peft computes with the merged weight alone.
            "active": [] if layer.merged else [one for one in layer.active_adapters if one in configs],
            "disabled": layer.disable_adapters,
            "scaling": {one: float(value) for one, value in _scaling(layer).items() if one in configs},
        }
        for name, layer in adapted_layers(model).items()
    }
    state = json.dumps({"adapters": folders, "layers": layers}, indent=2)
    (directory / DIRECTORY / STATE_FILE).write_text(state + "\n", encoding="utf-8")


def _scaling(layer: nn.Module) -> dict[str, float]:
    scaling = getattr(layer, "scaling", None)  # not every kind has one
    return scaling if isinstance(scaling, dict) else {}


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Put what :func:`save_adapters` wrote to ``directory``, if anything, around the layers of ``model``.

    Raises:
        ImportError: if there is something, and peft is not installed.
        OSError: if an adapter is not where it should be.
    """
    state_file = directory / DIRECTORY / STATE_FILE
    if not state_file.is_file():
        return
    try:
        import peft
    except ImportError:
        raise ImportError(f"{directory} holds adapters; install peft to load them") from None
    from safetensors.torch import load_file

    state = json.loads(state_file.read_text(encoding="utf-8"))
    for name, number in state["adapters"].items():
        folder = directory / DIRECTORY / number
        tensors = load_file(folder / WEIGHTS_FILE)
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), model, adapter_name=name)
        # peft makes adapters in the dtype of their layers, and would round to it those that were trained in fp32.
        parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        for key, made in peft.get_peft_model_state_dict(model, adapter_name=name).items():
            if made.data_ptr() in parameters and key in tensors:
                parameters[made.data_ptr()].data = made.to(tensors[key].dtype)
        peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    for name, layer in adapted_layers(model).items():
        how = state["layers"][own_name(name)]
        layer.set_adapter(how["active"])
        layer.enable_adapters(not how["disabled"])
        _scaling(layer).update(how["scaling"])
