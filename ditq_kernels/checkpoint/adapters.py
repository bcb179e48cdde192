"""Adapters (LoRA and its kin, by peft) of models that are saved and loaded: the model is stored as it is without them,
and they beside it, in peft's own format.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..model.wrappers import BASE, adapted_layers, own_name

DIRECTORY = "adapters"  # a folder for each, by its name
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name for it
STATE_FILE = "state.json"  # which are active, and their scales


@contextlib.contextmanager
def without_adapters(*models: nn.Module) -> Iterator[None]:
    """The layers themselves stand in the models in place of those that adapters are put around, until the end of the
    ``with`` block.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    flags: list[tuple[nn.Module, bool]] = []
    for model in models:
        layers = set(adapted_layers(model).values())
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child in layers:
                    replaced.append((parent, name, child))
                    parent._modules[name] = child._modules[BASE]
        if layers and "_hf_peft_config_loaded" in vars(model):  # transformers would save the adapters alone
            flags.append((model, model._hf_peft_config_loaded))
            model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child
        for model, flag in flags:
            model._hf_peft_config_loaded = flag


def save_adapters(model: nn.Module, directory: Path) -> None:
    """Write those of the bare ``model`` that are not merged into its weights, if there are any, to folders in
    ``directory``.
    """
    layers = adapted_layers(model)
    merged = {adapter for layer in layers.values() for adapter in layer.merged_adapters}
    configs = {name: config for name, config in getattr(model, "peft_config", {}).items() if name not in merged}
    if not layers or not configs:
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name, config in configs.items():
        folder = directory / DIRECTORY / name
        config.save_pretrained(str(folder))
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    state = {
        "active": [name for name in next(iter(layers.values())).active_adapters if name in configs],
        "scaling": {own_name(name): getattr(layer, "scaling", {}) for name, layer in layers.items()},
    }
    (directory / DIRECTORY / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Put what :func:`save_adapters` wrote to ``directory``, if anything, around the layers of ``model``.

    Raises:
        ImportError: if there is something, and peft is not installed.
    """
    state_file = directory / DIRECTORY / STATE_FILE
    if not state_file.is_file():
        return
    try:
        import peft
    except ImportError:
        raise ImportError(f"{directory} holds adapters; install peft to load them") from None
    from safetensors.torch import load_file

    state = json.loads(state_file.read_text())
    for folder in sorted(path.parent for path in state_file.parent.glob(f"*/{WEIGHTS_FILE}")):
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), model, adapter_name=folder.name)
        tensors = load_file(folder / WEIGHTS_FILE)
        # peft makes adapters in the dtype of their layers, and would round to it those that were trained in fp32.
        parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        for key, made in peft.get_peft_model_state_dict(model, adapter_name=folder.name).items():
            if made.data_ptr() in parameters and key in tensors:
                parameters[made.data_ptr()].data = made.to(tensors[key].dtype)
        peft.set_peft_model_state_dict(model, tensors, adapter_name=folder.name)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    for name, layer in adapted_layers(model).items():
        layer.set_adapter(state["active"])
        layer.scaling.update({key: value for key, value in state["scaling"][name].items() if key in layer.scaling})
