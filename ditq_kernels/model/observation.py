"""Watching one step of a sampling run: counting its steps, and what linear layers are fed in the chosen one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import nn

from ..layer.linear import QuantLinear
from .rows import Rows, samples_of
from .steps import Steps
from .wrappers import adapters_modules

ROWS_PER_CHUNK = 8192  # rows widened to fp32 at a time, so that a moment needs no fp32 copy of a whole 16-bit input


class _StopRun(BaseException):
    """Ends a sampling run from inside the model; no Exception, so that a pipeline's handlers let it pass."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name to layer, of every ``nn.Linear`` in ``model`` that is not quantized yet and no adapter's."""
    others = adapters_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, QuantLinear) and module not in others
    }


def count_steps(model: nn.Module, run: Callable[[], Any], calls_per_step: int | None = None) -> Steps:
    """Steps of ``run()`` and its calls of ``model``, at the cost of one forward pass; as :class:`Steps` counts them.

    The model runs at its first call; later calls get that output again. It runs anew only when the inputs' shapes are
    new, so that the outputs always fit the sampler's arithmetic.
    """
    steps = Steps(model, calls_per_step)
    outputs: dict[Any, Any] = {}
    forward = model.forward
    overridden = vars(model).get("forward")  # offloading libraries put a forward of their own on the instance

    def replay(*args: Any, **kwargs: Any) -> Any:
        steps.begin_call(args, kwargs)
        leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
        shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
        key = (str(structure), shapes)
        if key not in outputs:
            outputs[key] = forward(*args, **kwargs)
        return outputs[key]

    model.forward = replay
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        if overridden is None:
            del model.forward
        else:
            model.forward = overridden
    return steps


class CallObserver(Protocol):
    """What :func:`observe_steps` tells of a run."""

    def begin(self, step: int, samples: int | None) -> None:
        """A call of the model begins, in the ``step``-th step, from 0, on so many samples if that is known."""

    def see(self, name: str, x: torch.Tensor) -> None:
        """The linear layer ``name`` is fed ``x``; only steps that are to be seen come here. May raise."""


def observe_steps(
    model: nn.Module,
    run: Callable[[], Any],
    wanted: Sequence[int],
    observer: CallObserver,
    calls_per_step: int | None = None,
    last_call: int | None = None,
    layers: Mapping[str, nn.Module] | None = None,
) -> Steps:
    """Run until ``observer`` has seen the ``wanted`` steps, in ascending order; the steps and calls that there were.

    It sees what ``layers`` are fed, by default :func:`linear_layers`. A step is known to have ended when the next one
    begins, or behind the ``last_call``-th call.

    Raises:
        Whatever ``observer.see`` raises.
    """
    steps = Steps(model, calls_per_step)
    step = -1
    failure: Exception | None = None

    def begin(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal step
        step = steps.begin_call(args, kwargs)
        if step == wanted[-1] + 1:
            raise _StopRun
        observer.begin(step, samples_of(args, kwargs))

    def end(*_: Any) -> None:
        if steps.calls == last_call:
            raise _StopRun

    def watch(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal failure
            if step not in wanted:
                return
            try:
                # Not in the run's own inference mode: what is kept must be ordinary tensors.
                with torch.inference_mode(False), torch.no_grad():
                    observer.see(name, args[0] if args else kwargs["input"])
            except Exception as error:
                failure = error
                raise _StopRun from None

        return see

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, layer in (linear_layers(model) if layers is None else layers).items():
            hooks.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(end).remove)
        # Compiled code would be traced again with the hooks in it; one step is quicker without.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        with suppress(_StopRun):
            run()
    if failure is not None:
        raise failure
    return steps


class Observer:
    """Collects what layers are fed: largest magnitudes, of all and by channel, tokens, rows and, for those in
    ``moment_names``, second moments. Magnitudes are those of the step ``ranges_of``; None: of every one that it sees.
    """

    def __init__(self, percentile: float | None, moment_names: Collection[str], ranges_of: int | None = None) -> None:
        self.percentile = percentile
        self.moment_names = frozenset(moment_names)
        self.ranges_of = ranges_of
        self._step = -1
        self.amax: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.channel_amax: dict[str, torch.Tensor] = {}
        self.moments: dict[str, torch.Tensor] = {}
        self.rows = Rows()
        self._input: torch.Tensor | None = None
        self._contribution: torch.Tensor | None = None
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, step: int, samples: int | None) -> None:
        self._step = step
        self.rows.begin(step, samples)

    def see(self, name: str, x: torch.Tensor) -> None:
        """Record ``x`` [..., K], one input of the layer ``name``.

        Raises:
            ValueError: if it is not finite, naming the layer.
        """
        if x.numel() == 0:
            return
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"the input of {name} holds NaN or infinite values in the observed step; "
                "calibrate in a wider dtype (bfloat16 or float32) or on another step"
            )
        self.tokens[name] = self.tokens.get(name, 0) + x.numel() // x.shape[-1]
        self.rows.see(name, x)
        if self.ranges_of in (None, self._step):
            self._widen_ranges(name, x)
        if name in self.moment_names:
            self._add_moment(name, x)

    def _widen_ranges(self, name: str, x: torch.Tensor) -> None:
        self.amax[name] = max(self.amax.get(name, 0.0), largest_magnitude(x, self.percentile))
        channels = x.abs().reshape(-1, x.shape[-1]).amax(0).to("cpu", torch.float32)
        before = self.channel_amax.get(name)
        self.channel_amax[name] = channels if before is None else torch.maximum(before, channels)

    def _add_moment(self, name: str, x: torch.Tensor) -> None:
        # Layers side by side (to_q, to_k, to_v) are fed the same values: one product and one tensor serve all of them.
        # Values are compared, not identities: an input may be changed in place between two layers, and under inference
        # mode tensors count no versions.
        if self._input is None or not _same_values(self._input, x):
            self._input = x.clone()
            self._contribution = second_moment(x).cpu()
            self._sums = {}
        before = self.moments.get(name)
        if before is None:
            self.moments[name] = self._contribution
        else:
            if id(before) not in self._sums:
                # Holding ``before`` keeps its id its own.
                self._sums[id(before)] = (before, before + self._contribution)
            self.moments[name] = self._sums[id(before)][1]


def rows_per_sample(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Rows of each sample that linear layers are fed in ``run``'s first call of ``model``; empty if it is not known how
    many samples there are. On the meta device that is a matter of shapes and costs no arithmetic.

    Raises:
        ValueError: if ``run`` does not call ``model``.
    """
    rows = Rows()
    if not observe_steps(model, run, [0], rows, calls_per_step=1, last_call=1).calls:
        raise ValueError(f"run() never called the {type(model).__name__} whose layers it was to feed")
    return rows.per_sample


def _same_values(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


def largest_magnitude(x: torch.Tensor, percentile: float | None = None) -> float:
    """``max |x|``, or the magnitude that ``percentile`` per cent of the elements do not exceed (nearest rank)."""
    if percentile is None:
        return float(x.abs().amax())
    magnitudes = x.abs().flatten().to(torch.float32)
    rank = min(max(math.ceil(percentile / 100 * magnitudes.numel()), 1), magnitudes.numel())
    return float(magnitudes.kthvalue(rank).values)  # torch.quantile refuses more than 2**24 elements


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """fp32 [K, K] on ``x``'s device: the sum of ``x x^T`` over the rows of ``x`` [..., K]."""
    rows = x.reshape(-1, x.shape[-1])
    total = torch.zeros((rows.shape[1], rows.shape[1]), dtype=torch.float32, device=x.device)
    for chunk in rows.split(ROWS_PER_CHUNK):
        chunk = chunk.to(torch.float32)
        total.addmm_(chunk.T, chunk)  # in place: a product that the run's autocast does not turn into a 16-bit one
    return total
