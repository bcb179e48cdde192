"""Every model that diffusers exports is saved and loaded with quantized layers, whatever it holds beside them."""

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from small_model_arguments import (
    LARGE_LAYERS_ONLY,
    NO_LINEAR_LAYERS,
    NONE_REPEATED,
    NOT_STORED,
    OTHERS,
    SIDE_BY_SIDE,
    UNTESTED,
    build,
)
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

import ditq_kernels as ditq
from ditq_kernels.integrations.diffusers import DitqConfig
from ditq_kernels.model.conversion import quantized_layers
from ditq_kernels.model.observation import linear_layers
from ditq_kernels.model.recipes import general

SCHEME = "w4a8_g32"
CLASSES: dict[str, type] = {
    name: cls
    for name in dir(diffusers)
    if inspect.isclass(cls := getattr(diffusers, name)) and issubclass(cls, ModelMixin) and cls is not ModelMixin
}


def of_reason(reason: str) -> Any:
    return pytest.mark.parametrize(
        "name", [name for name, why in UNTESTED.items() if why == reason and name in CLASSES]
    )


def held(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor, of all that a model holds: parameters, buffers, and what is in plain attributes."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif isinstance(value, nn.Module) or type(value).__module__.startswith("diffusers."):
        parts = getattr(value, "__dict__", {}).items()
    else:
        return
    if id(value) not in seen:
        seen.add(id(value))
        for key, part in parts:
            yield from held(part, f"{path}.{key}", seen)


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of :func:`held` that are neither parameters nor buffers."""
    registered = ("_parameters", "_buffers")
    return {path: one for path, one in tensors.items() if path.split(".")[-2] not in registered}


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):  # a plain attribute that is computed before each call
                hook(module, None)
    return dict(held(model))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for path, tensor in one.items():
        assert not tensor.is_meta and not other[path].is_meta, path
        assert tensor.dtype == other[path].dtype, path
        assert torch.equal(tensor.nan_to_num(), other[path].nan_to_num()), path


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert_equal(one.state_dict(), other.state_dict())
    assert_equal(everything(one), everything(other))
    layers = [[(name, x.scheme, x.dtype) for name, x in quantized_layers(model).items()] for model in (one, other)]
    assert layers[0] and layers[0] == layers[1]


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in UNTESTED])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_saved_and_loaded(name, tmp_path, monkeypatch):
    if name in LARGE_LAYERS_ONLY:
        monkeypatch.setattr(general, "FEW_WEIGHTS", 0)
    cls, in_16_bits, stored = CLASSES[name], str(tmp_path / "16"), str(tmp_path / "quantized")
    model = build(cls)
    tables = {path: tensor.clone() for path, tensor in plain(everything(model)).items()}
    model.save_pretrained(in_16_bits)
    ditq.quantize(model, SCHEME, progress=False)
    model.save_pretrained(stored)
    loaded = cls.from_pretrained(stored)
    assert_same(model, loaded)
    assert_equal(tables, plain(everything(loaded)))
    assert_same(model, cls.from_pretrained(in_16_bits, quantization_config=DitqConfig(SCHEME)))


@pytest.mark.parametrize(
    "name", ["Kandinsky5Transformer3DModel", "Lumina2Transformer2DModel", "QwenImageTransformer2DModel"]
)
def test_tables_in_plain_attributes_are_seen(name):
    assert plain(everything(build(CLASSES[name])))


def unshrunk(name: str) -> nn.Module:
    """Without weights, of the sizes that the class has by itself."""
    if name in SIDE_BY_SIDE:
        return build(CLASSES[name])
    with torch.device("meta"):
        return CLASSES[name](**OTHERS.get(name, {}))


@of_reason(NO_LINEAR_LAYERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_has_no_linear_layers(name):
    assert not linear_layers(unshrunk(name))


@of_reason(NONE_REPEATED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_its_linear_layers_are_in_no_repeated_blocks(name):
    model = unshrunk(name)
    assert linear_layers(model) and not ditq.plan(model, SCHEME).quantized()


@of_reason(NOT_STORED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_cannot_store_and_load_it(name, tmp_path):
    model = build(CLASSES[name])
    with pytest.raises((AttributeError, TypeError)):
        ModelMixin.save_pretrained.__wrapped__(model, str(tmp_path))
        CLASSES[name].from_pretrained(str(tmp_path))
    ditq.quantize(model, SCHEME, progress=False)
    for index, part in enumerate(model.nets):  # by itself, each can be
        part.save_pretrained(str(tmp_path / str(index)))
        assert_same(part, type(part).from_pretrained(str(tmp_path / str(index))))


def test_models_side_by_side_that_diffusers_saves_without_a_configuration_are_saved(tmp_path):
    build(diffusers.QwenImageMultiControlNetModel).save_pretrained(str(tmp_path))
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_side_by_side_are_quantized_as_each_by_itself():
    for name, part in SIDE_BY_SIDE.items():
        if UNTESTED.get(name) == NO_LINEAR_LAYERS:
            continue
        chosen = ditq.plan(build(CLASSES[name]), SCHEME)
        alone = [entry.name for entry in ditq.plan(build(CLASSES[part]), SCHEME).quantized()]
        assert [entry.name for entry in chosen.quantized()] == [f"nets.{i}.{name}" for i in range(2) for name in alone]


def test_the_tables_name_classes():
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        pytest.skip("an older diffusers lacks some")
    assert not {*OTHERS, *SIDE_BY_SIDE, *LARGE_LAYERS_ONLY, *UNTESTED} - CLASSES.keys()
