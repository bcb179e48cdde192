"""Whole pipelines: what of them is quantized, their plans, and quantizing them. Also what ``ditq.plan``,
``ditq.quantize``, ``ditq.fuse`` and ``ditq.graph`` are, which take a model as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..layer.formats import Scheme
from . import conversion, cuda_graphs, fusion, planning
from .calibration import Calibration
from .planning import Plan

# What diffusers calls the parts of a pipeline that are quantized: what is sampled with, and what reads the prompt. The
# autoencoder, image encoders and adapters stay as they are.
DENOISER = r"(transformer|unet|prior)(_\d+)?"
ENCODER = r"text_encoder(_\d+)?"


def is_pipeline(model: object) -> bool:
    """Whether ``model`` is no model but a pipeline, as of diffusers: something that has ``components``."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping)


def models_of(pipeline: Any, components: Collection[str] | None = None) -> dict[str, nn.Module]:
    """The models of ``pipeline`` that are quantized, by the component's name: those of ``components``, or all denoisers
    and text encoders.

    Raises:
        ValueError: for a component that the pipeline does not have, or one that is no model; or if there is none.
    """
    found = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if components is None:
        chosen = [name for name in found if re.fullmatch(f"{DENOISER}|{ENCODER}", name)]
    else:
        chosen = [components] if isinstance(components, str) else list(components)
    for name in chosen:
        if name not in found:
            raise ValueError(f"the pipeline has no model {name!r}; it has {', '.join(found)}")
    if not chosen:
        raise ValueError(f"{type(pipeline).__name__} has neither a transformer nor a text encoder to quantize")
    models: dict[str, nn.Module] = {}
    for name in chosen:
        if not any(found[name] is model for model in models.values()):  # one may serve twice
            models[name] = found[name]
    return models


class PipelinePlan:
    """Plans of a pipeline's models: ``plan["transformer"]`` is a :class:`Plan`. Print it, edit its plans, take one out
    with ``del``.
    """

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = dict(plans)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __getitem__(self, component: str) -> Plan:
        """Raises KeyError, with the components that there are, for any other."""
        if component not in self._plans:
            raise KeyError(f"there is no plan of {component!r}, but of {', '.join(self._plans) or 'nothing'}")
        return self._plans[component]

    def __delitem__(self, component: str) -> None:
        """Raises as :meth:`__getitem__` does."""
        self[component]
        del self._plans[component]

    def __str__(self) -> str:
        return "\n\n".join(f"{name}: {one}" for name, one in self._plans.items())

    def __repr__(self) -> str:
        return f"<PipelinePlan: {', '.join(f'{name} {one!r}' for name, one in self._plans.items())}>"

    def summary(self) -> str:
        """A line for each model, as :meth:`Plan.summary`."""
        return "\n".join(f"{name}: {one.summary()}" for name, one in self._plans.items())


def plan(
    model: Any,
    scheme: str | Scheme = "w4a8_g128",
    *,
    calibration: Calibration | Mapping[str, Calibration] | None = None,
    components: Collection[str] | None = None,
    **options: Any,
) -> Plan | PipelinePlan:
    """What :func:`quantize` would do to ``model``, a model or a whole pipeline.

    Args:
        calibration: of the model; of a pipeline's one denoiser, or of its models by the component's name.
        components: names of a pipeline's models to quantize; None: all denoisers and text encoders.
        options: of a model's plan, see :func:`ditq_kernels.model.planning.plan`.

    Raises:
        TypeError, ValueError: as :func:`ditq_kernels.model.planning.plan` and :func:`models_of` do.
    """
    if not is_pipeline(model):
        _check_no_components(components)
        return planning.plan(model, scheme, calibration=calibration, **options)
    models = models_of(model, components)
    calibrations = _by_component(calibration, models)
    return PipelinePlan(
        {
            name: planning.plan(one, scheme_of(name, scheme), calibration=calibrations.get(name), **options)
            for name, one in models.items()
        }
    )


def quantize(
    model: Any,
    scheme_or_plan: str | Scheme | Plan | PipelinePlan,
    calibration: Calibration | Mapping[str, Calibration] | None = None,
    rounding: str = "nearest",
    *,
    components: Collection[str] | None = None,
    clip: float | str | None = None,
    fused: bool = False,
    progress: bool = True,
) -> Any:
    """Quantize ``model``, a model or a whole pipeline, in place; returns it.

    Of a pipeline, denoisers take the scheme, and text encoders its weights only, to nearest: they run once a picture.
    Everything is checked before the first weight is touched.

    Args:
        scheme_or_plan: a scheme or its name, or what :func:`plan` made for ``model``.
        calibration: of the model; of a pipeline's one denoiser, or of its models by the component's name.
        components: names of a pipeline's models to quantize; None: all denoisers and text encoders.
        rounding, clip, progress: see :func:`ditq_kernels.model.conversion.quantize`.
        fused: whether to :func:`fuse` it then.

    Raises:
        TypeError, ValueError: as :func:`ditq_kernels.model.conversion.quantize` and :func:`models_of` do.
    """
    if not is_pipeline(model):
        _check_no_components(components)
        conversion.quantize(model, scheme_or_plan, calibration, rounding, clip=clip, progress=progress)
        return fuse(model) if fused else model
    if isinstance(scheme_or_plan, Plan):
        raise TypeError("a Plan is of one model; of a pipeline, ditq.plan(pipe, ...) makes one for each of its models")
    if isinstance(scheme_or_plan, PipelinePlan):
        chosen = scheme_or_plan
        wanted = list(chosen) if components is None else components
        models = models_of(model, wanted or None)
        for name in models:
            if name not in chosen:
                raise ValueError(f"the plan is of {', '.join(chosen) or 'nothing'}, and has none of {name}")
    else:
        models = models_of(model, components)
        for name, one in models.items():
            conversion.check_unquantized(one, str(scheme_of(name, scheme_or_plan)))
        chosen = plan(model, scheme_or_plan, calibration=calibration, components=components)
    calibrations = _by_component(calibration, models)
    requests = []
    for name, one in models.items():
        how = rounding if name in calibrations or not re.fullmatch(ENCODER, name) else "nearest"
        conversion.check(one, chosen[name], calibrations.get(name), how, clip)
        requests.append((one, chosen[name], calibrations.get(name), how))
    for request in requests:
        conversion.convert(*request, clip=clip, progress=progress)
    return fuse(model) if fused else model


def fuse(model: Any) -> Any:
    """Let the blocks of ``model``, a transformer or a pipeline of diffusers, make fewer passes, in place; returns it.

    In every attention, layers that are fed the same input quantize it once and multiply it in one product. In blocks
    that are known (:data:`ditq_kernels.model.fused_blocks.FUSED_BLOCKS`), norms and their modulation, and GELU, hand on
    int8 codes, and what is gated is added in one pass.

    Nothing that is stored changes: parameters keep their names, as views of joined memory; state dicts, adapters and
    saving work as before. Products give the same bits; norms and gates round once where they rounded several times.
    Everything runs as before where gradients are wanted, and what has got an adapter or a hook is called as it was.
    :func:`unfuse` undoes it.

    Raises:
        TypeError: if ``model`` is neither.
    """
    for part in _parts(model):
        fusion.fuse(part)
    return model


def unfuse(model: Any) -> Any:
    """Undo :func:`fuse`, in place; returns ``model``.

    Raises:
        TypeError: if ``model`` is neither a model nor a pipeline.
    """
    for part in _parts(model):
        fusion.unfuse(part)
    return model


def graph(model: Any) -> Any:
    """Let ``model``, a transformer or the denoisers of a pipeline, replay CUDA graphs, in place; returns it.

    A call is captured once for each kind of inputs (shapes, dtypes, and the values of what are no tensors), after a few
    that warm up, and replayed from then on: for steps that take the host longer than the GPU. The last four graphs are
    kept, each with its own memory. Results are copies. What cannot be replayed is called as it is: inputs on a CPU,
    wanted gradients, autocast, models within which hooks hang (offloading, caches). Parameters that are replaced or
    moved are noticed, and the graph is captured again; hooks of the model itself are called. Not together with
    ``torch.compile``, which has graphs of its own (``mode="reduce-overhead"``). :func:`ungraph` undoes it.

    Raises:
        TypeError: if ``model`` is neither.
    """
    for part in _denoisers(model):
        cuda_graphs.graph(part)
    return model


def ungraph(model: Any) -> Any:
    """Undo :func:`graph`, in place; returns ``model``.

    Raises:
        TypeError: if ``model`` is neither a model nor a pipeline.
    """
    for part in _denoisers(model):
        cuda_graphs.ungraph(part)
    return model


def _denoisers(model: Any) -> list[nn.Module]:
    if not is_pipeline(model):
        return _parts(model)
    parts = model.components.items()
    return [part for name, part in parts if isinstance(part, nn.Module) and is_denoiser(name)]


def _parts(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    if not is_pipeline(model):
        raise TypeError(f"model must be an nn.Module or a pipeline, got {type(model).__name__}")
    return [part for part in model.components.values() if isinstance(part, nn.Module)]


def is_denoiser(component: str) -> bool:
    """Whether the component of this name samples; a model that stands alone, "", does."""
    return not component or re.fullmatch(DENOISER, component) is not None


def scheme_of(component: str, scheme: str | Scheme) -> Scheme:
    """What ``scheme`` is for a component: encoders are quantized in their weights only, and need no calibration."""
    scheme = Scheme.parse(scheme)
    return scheme.weight_only if re.fullmatch(ENCODER, component) else scheme


def _by_component(
    calibration: Calibration | Mapping[str, Calibration] | None, models: Mapping[str, nn.Module]
) -> dict[str, Calibration]:
    if calibration is None:
        return {}
    if isinstance(calibration, Mapping):
        for name in calibration:
            if name not in models:
                raise ValueError(f"a calibration is given for {name!r}, and quantized are {', '.join(models)}")
        return dict(calibration)
    denoisers = [name for name in models if re.fullmatch(DENOISER, name)]
    if len(denoisers) != 1:
        raise ValueError(
            f"one calibration is given, and the pipeline quantizes {', '.join(denoisers) or 'no denoiser'}; "
            "give calibration={component: calibration, ...}"
        )
    return {denoisers[0]: calibration}


def _check_no_components(components: Collection[str] | None) -> None:
    if components is not None:
        raise TypeError("components name the models of a pipeline, and this is a model")
