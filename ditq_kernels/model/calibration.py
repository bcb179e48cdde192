"""Calibration from one step of one sampling run (arXiv 2406.11100): what each linear layer is fed there. Second
moments, for compensated rounding, may be of several steps of that run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import written_whole
from ..memory import warn_of_shortage
from .chosen_steps import ALL_STEPS, StepChoice, check_steps, choose_steps, observe_chosen, several
from .observation import Observer, linear_layers
from .wrappers import bare, own_name

FORMAT = "ditq-calibration"
VERSION = 3
SMOOTHED = "_inputs_smoothed"  # on a model: adapters and calibrations from before do not fit any more
DEFAULT_STEP = 0.6  # docs/experiments.md has the reasons for these
DEFAULT_MOMENT_STEPS = (0.6, 0.3, 0.9)  # where there are second moments; ranges are of the first
DEFAULT_PICTURES = 20  # of a calibration run; `calibrate` takes whatever its run draws
CHANNEL_AMAX = "channel_amax."  # and the layer's name: a tensor's name in the file


@dataclass(eq=False)
class Calibration:
    """What the linear layers of a model were fed in one sampling step, or in several.

    Attributes:
        model: the name of the model's class.
        in_features: K of every unquantized linear layer of the model, called in that step or not.
        step, steps: the step observed, None if all were; and the steps of the run where they were counted (else None).
        moment_steps: those that moments and tokens are of, if they are several; ranges are of ``step``, their first.
        calls_per_step: most calls of the model that made one step.
        percentile: of the magnitudes, taken as ``amax``; None means the largest.
        amax: largest input magnitude of each layer that was called in the step.
        moments: fp32 [K, K], the sum of ``x x^T`` over the steps' tokens; layers fed the same input share one tensor.
        tokens: rows that each layer was fed.
        channel_amax: fp32 [K], the largest magnitude of each of a layer's input channels, whatever ``percentile`` is.
        rows: the most rows per sample that one call of the model fed each layer: 1 for a modulation. Empty where it is
            not known how many samples a call has.
        smoothed: whether it is of a model after ``ditq.smooth``; None where it is not known (older files).
    """

    model: str
    in_features: dict[str, int]
    step: int | None
    steps: int | None
    calls_per_step: int
    percentile: float | None = None
    amax: dict[str, float] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    channel_amax: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)
    moment_steps: tuple[int, ...] = ()
    smoothed: bool | None = None

    @property
    def observed(self) -> StepChoice:
        """The steps, as :func:`calibrate` takes them; of another run with as many, nothing has to be counted."""
        return ALL_STEPS if self.step is None else self.moment_steps or self.step

    @classmethod
    def merged(cls, calibrations: Sequence[Calibration]) -> Calibration:
        """One of all, taken on the same step of several runs: the largest ranges, the sums of moments and tokens.

        Raises:
            ValueError: if there are none, or they are of different models or layers.
        """
        first, *others = calibrations
        merged = replace(
            first,
            **{name: dict(getattr(first, name)) for name in ("amax", "moments", "tokens", "channel_amax", "rows")},
        )
        for other in others:
            if (other.model, other.in_features) != (first.model, first.in_features):
                raise ValueError(f"calibrations of {first.model} and {other.model} are not of one model")
            if other.moments.keys() != first.moments.keys():
                raise ValueError("calibrations have second moments of different layers")
            merged.calls_per_step = max(merged.calls_per_step, other.calls_per_step)
            sums: dict[tuple[int, int], torch.Tensor] = {}  # layers fed the same input go on sharing a tensor
            for name, moment in other.moments.items():
                key = id(merged.moments[name]), id(moment)
                if key not in sums:
                    sums[key] = merged.moments[name] + moment
                merged.moments[name] = sums[key]
            for name, count in other.tokens.items():
                merged.tokens[name] = merged.tokens.get(name, 0) + count
            for mine, theirs in ((merged.amax, other.amax), (merged.rows, other.rows)):
                for name, value in theirs.items():
                    mine[name] = max(mine.get(name, value), value)
            for name, channels in other.channel_amax.items():
                merged.channel_amax[name] = torch.maximum(merged.channel_amax.get(name, channels), channels)
        return merged

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` has every layer that was calibrated, with the same K, and is smoothed if it
        was then.
        """
        if self.smoothed is False and is_smoothed(model):
            raise ValueError(
                "the calibration was taken before the model was smoothed: take the one that ditq.smooth returned"
            )
        if self.smoothed and not is_smoothed(model):
            raise ValueError("the calibration is of the smoothed model, and this one is not: calibrate this model")
        layers = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.named_as_in(model).check_layers(layers, type(model).__name__)

    def named_as_in(self, model: nn.Module) -> Calibration:
        """The same with the names that layers have in ``model``, around which adapters may have come, or gone."""
        now = {own_name(name): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        names = {name: now.get(own_name(name), name) for name in self.in_features}
        if all(name == new for name, new in names.items()):
            return self
        by_layer = ("in_features", "amax", "moments", "tokens", "channel_amax", "rows")
        return replace(
            self, **{held: {names[name]: value for name, value in getattr(self, held).items()} for held in by_layer}
        )

    def check_layers(self, in_features: Mapping[str, int], model: str = "model") -> None:
        """:meth:`check` on a mapping from layer names to K; ``model`` is what messages call the model."""
        origin = f"the calibration was taken on another model ({self.model})"
        for name, expected in self.in_features.items():
            if name not in in_features:
                raise ValueError(f"{origin}: this {model} has no linear layer {name}; calibrate this model")
            if in_features[name] != expected:
                raise ValueError(
                    f"{origin}: {name} has K = {in_features[name]} in this {model} and K = {expected} there; "
                    "calibrate this model"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; a file already there is replaced at once, or not at all."""
        from safetensors.torch import save_file

        stored: dict[int, str] = {}
        tensors, moment_of = {}, {}
        for name, moment in self.moments.items():
            if id(moment) not in stored:
                stored[id(moment)] = f"moment.{len(stored)}"
                tensors[stored[id(moment)]] = moment.contiguous()
            moment_of[name] = stored[id(moment)]
        tensors |= {CHANNEL_AMAX + name: channels.contiguous() for name, channels in self.channel_amax.items()}
        record = {
            "model": self.model,
            "in_features": self.in_features,
            "step": self.step,
            "steps": self.steps,
            "calls_per_step": self.calls_per_step,
            "percentile": self.percentile,
            "amax": self.amax,
            "tokens": self.tokens,
            "rows": self.rows,
            "moment_steps": self.moment_steps,
            "smoothed": self.smoothed,
        }
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "calibration": json.dumps(record),
            "moments": json.dumps(moment_of),
        }
        with written_whole(path) as unfinished:
            save_file(tensors, unfinished, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what :meth:`save` wrote; moments on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a calibration, or one of a newer version.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no calibration file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is a safetensors file but not a calibration; ditq.calibrate(...).save writes one"
                    )
                if int(header["version"]) > VERSION:
                    raise ValueError(f"{path} was written by a newer ditq_kernels; upgrade to read it")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
                moment_of = json.loads(header["moments"])
                moments = {name: tensors[key] for name, key in moment_of.items()}
                channels = {
                    key.removeprefix(CHANNEL_AMAX): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(CHANNEL_AMAX)
                }
                record = json.loads(header["calibration"])
                record["moment_steps"] = tuple(record.get("moment_steps", ()))  # files of version 1 have none
                return cls(**record, moments=moments, channel_amax=channels)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a calibration file, or is damaged: {error}") from None


def is_smoothed(model: nn.Module) -> bool:
    """Whether ``ditq.smooth`` has scaled the inputs of some of ``model``'s layers."""
    return getattr(bare(model), SMOOTHED, False)


def moment_bytes(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Upper bound of the memory, in bytes, that ``calibrate(model, ..., moments=names)`` takes for second moments.

    ``4 K^2`` per layer; layers fed the same input share a moment, so less is taken. ``names``: layer names or fnmatch
    patterns; None: all.

    Raises:
        ValueError: if a name or pattern matches no linear layer.
    """
    layers = linear_layers(model)
    chosen = layers if names is None else _matching(layers, names)
    return sum(4 * layers[name].in_features ** 2 for name in chosen)


def calibrate(
    model: nn.Module,
    run: Callable[[], Any],
    step: StepChoice | None = None,
    *,
    percentile: float | None = None,
    moments: bool | Collection[str] = False,
    calls_per_step: int | None = None,
) -> Calibration:
    """Observe one step of a sampling run; for second moments, several.

    Args:
        model: the model that the sampler calls; it is left as it was.
        run: does one sampling run, of any pipeline or sampler that calls ``model``; ended after the last observed step.
            A fraction or a negative ``step`` runs it twice: first to count its steps, which costs one forward pass
            (its output is replayed for all later calls) and the sampler's own arithmetic. So ``run`` must be
            repeatable, and may not let the model's values decide how many steps it takes.
        step: an index (negative: from the end), a fraction in [0, 1] of the run as a float, or several of them: ranges
            are those of the first, and second moments the sum over all. Without moments only the first is observed. Or
            "all": every step of one whole run, whose ranges are too wide for static schemes. None: the step at 0.6, and
            for moments those at 0.3 and 0.9 too, which serve compensated rounding as well as all do.
        percentile: in (0, 100]: take this percentile of the magnitudes (nearest rank) for ``amax`` and let larger
            inputs saturate. Over several calls of a layer, the largest of the calls' percentiles.
        moments: True, or a collection of layer names and fnmatch patterns: also the second moments that
            error-compensated rounding needs. They are computed in fp32 on the layer's device, one layer at a time, and
            kept on the CPU: at most ``4 K^2`` bytes per layer (:func:`moment_bytes` says how much in all), and on the
            device one input and one [K, K] fp32 matrix.
        calls_per_step: calls of ``model`` in one step. None: calls in a row at the same time are one step, as of
            pipelines that do guidance in a second call.

    A layer that the step does not call is absent from the result's ``amax``.

    Raises:
        TypeError: if ``model`` is no module, ``run`` not callable, or ``step`` no number.
        ValueError: for a model without linear layers, a run that does not call the model, a step beyond the run or
            given twice, inputs that are not finite (naming the layer), a name in ``moments`` that matches nothing, and
            numbers out of range.

    Warns:
        MemoryWarning: if second moments may take more memory than there is; before anything runs.
    """
    check_request(model, run)
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no unquantized linear layer to calibrate")
    if isinstance(moments, bool):
        moment_names: Collection[str] = layers if moments else ()
    else:
        moment_names = _matching(layers, moments)
    warn_of_shortage(
        sum(4 * layers[name].in_features ** 2 for name in moment_names),
        "second moments of these layers take, less where layers are fed the same,",
        "name some of the layers in moments=, or round to nearest",
        stacklevel=2,
    )
    by_default = step is None
    if by_default:
        step = DEFAULT_MOMENT_STEPS if moment_names else DEFAULT_STEP
    check_numbers(step, percentile, calls_per_step)
    if not moment_names and step != ALL_STEPS:
        step = several(step)[0]
    chosen = choose_steps(model, run, step, calls_per_step, once=by_default)
    first = None if chosen.indices is None else chosen.indices[0]
    observer = Observer(percentile, moment_names, ranges_of=first)
    seen = observe_chosen(model, run, chosen, observer, calls_per_step, layers)
    return Calibration(
        type(model).__name__,
        {name: layer.in_features for name, layer in layers.items()},
        first,
        seen.steps if chosen.indices is None else chosen.steps,
        seen.most_calls,
        percentile,
        observer.amax,
        observer.moments,
        observer.tokens,
        observer.channel_amax,
        observer.rows.per_sample,
        chosen.indices if chosen.indices is not None and len(chosen.indices) > 1 else (),
        is_smoothed(model),
    )


def check_request(model: nn.Module, run: Callable[[], Any]) -> None:
    """Raise TypeError unless they are what :func:`calibrate` takes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; of a pipeline, give its transformer")
    if not callable(run):
        raise TypeError(f"run must be callable without arguments, got {type(run).__name__}")


def check_numbers(step: StepChoice, percentile: float | None, calls_per_step: int | None) -> None:
    """Raise TypeError or ValueError unless they are what :func:`calibrate` takes."""
    check_steps(step)
    if percentile is not None and not (isinstance(percentile, Real) and 0 < percentile <= 100):
        raise ValueError(f"percentile must lie in (0, 100], got {percentile!r}")
    if calls_per_step is None:
        return
    if isinstance(calls_per_step, bool) or not isinstance(calls_per_step, Integral) or calls_per_step < 1:
        raise ValueError(f"calls_per_step must be a positive int or None, got {calls_per_step!r}")


def _matching(layers: Mapping[str, nn.Linear], patterns: Collection[str]) -> set[str]:
    """The names that any of ``patterns`` matches; a pattern that matches none is an error, for it is a misspelling."""
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matched = {name for name in layers if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(f"moments: {pattern!r} matches no unquantized linear layer of the model")
        chosen |= matched
    return chosen
