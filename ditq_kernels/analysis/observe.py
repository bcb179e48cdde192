"""One sampling run, watched from its first step to its last: what linear layers are fed, and where attention looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..model.observation import count_steps, linear_layers, observe_steps
from .statistics import Histogram, InputStatistics

ATTENTION_ROWS = 64  # queries of each call whose probabilities are computed, spread evenly over the first sample


@dataclass
class AttentionStatistics:
    """Attention probabilities of one attention module, of some queries of every call.

    Attributes:
        probabilities: all of them.
        rows: queries seen; largest: sum over them of the largest probability.
    """

    probabilities: Histogram = field(default_factory=Histogram)
    rows: int = 0
    largest: float = 0.0

    def add(self, query: torch.Tensor, key: torch.Tensor, heads: int) -> None:
        """``query`` and ``key`` [B, T, heads * d] as projected; the first sample's are taken.

        Raises:
            ValueError: if they are not finite.
        """
        query, key = (part.detach()[0].to(torch.float32).unflatten(-1, (heads, -1)) for part in (query, key))
        picked = torch.linspace(0, len(query) - 1, min(len(query), ATTENTION_ROWS), device=query.device).long()
        scores = torch.einsum("qhd,khd->hqk", query[picked], key) * query.shape[-1] ** -0.5
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("queries or keys hold NaN or infinite values")
        probabilities = scores.softmax(-1)
        self.probabilities.add(probabilities)
        self.rows += probabilities.shape[0] * probabilities.shape[1]
        self.largest += float(probabilities.amax(-1).sum())


@dataclass
class Observation:
    """What one run showed.

    Attributes:
        steps: of the run; calls_per_step: most calls of the model in one.
        inputs: by linear layer, of those that were called.
        attention: by attention module, of those whose probabilities follow from their projections alone.
        not_called: linear layers that the run never called.
    """

    steps: int
    calls_per_step: int
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    attention: dict[str, AttentionStatistics] = field(default_factory=dict)
    not_called: list[str] = field(default_factory=list)


class _RunObserver:
    """Puts what layers are fed where it belongs; see :func:`ditq_kernels.model.observation.observe_steps`."""

    def __init__(self, observation: Observation, progress: Callable[[], Any]) -> None:
        self.observation, self.progress, self.step = observation, progress, 0

    def begin(self, step: int, samples: int | None) -> None:
        self.step = step
        self.progress()

    def see(self, name: str, x: torch.Tensor) -> None:
        with self.not_finite(f"the input of {name}"):
            self.observation.inputs.setdefault(name, InputStatistics()).add(x, self.step)

    @contextmanager
    def not_finite(self, what: str) -> Iterator[None]:
        """Errors of statistics that were given NaN or infinite values, with their place and a way out."""
        try:
            yield
        except ValueError:
            raise ValueError(
                f"{what} holds NaN or infinite values in step {self.step}; analyze in a wider dtype (bfloat16 or "
                "float32)"
            ) from None


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module, of every attention whose probabilities are ``softmax(q k^T / sqrt(d))`` of what its projections
    ``to_q`` and ``to_k`` give, as diffusers names them. Those that norm or rotate queries and keys, join those of a
    text, or look at a text (which may be masked) are left out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in ("to_q", "to_k"))
        and isinstance(getattr(module, "heads", None), int)
        and module.to_q.out_features == module.to_k.out_features
        and getattr(module, "norm_q", None) is None
        and getattr(module, "add_k_proj", None) is None
        and not getattr(module, "is_cross_attention", False)
        and "Rotary" not in type(getattr(module, "processor", None)).__name__
    }


def observe_run(
    model: nn.Module, run: Callable[[], Any], calls_per_step: int | None = None, progress: bool = True
) -> Observation:
    """Watch ``run()``, one sampling run that calls ``model``, from beginning to end.

    It is run twice: first to count its steps, at the cost of one forward pass. Memory does not depend on the number of
    steps, but for two numbers per layer and step.

    Raises:
        ValueError: for a model without linear layers, a run that calls neither it nor one of them, a number of calls
            that is no multiple of ``calls_per_step``, and inputs that are not finite, naming layer and step.
    """
    from tqdm import tqdm

    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no unquantized linear layer to analyze")
    counted = count_steps(model, run, calls_per_step)
    if not counted.calls:
        raise ValueError(
            f"run() never called the {type(model).__name__} given to analyze; give the model that the pipeline itself "
            "holds"
        )
    counted.check_whole()
    observation = Observation(counted.steps, counted.most_calls)
    bar = tqdm(total=counted.calls, desc="observe", unit="call", file=sys.stderr, leave=False, disable=not progress)
    with bar, ExitStack() as hooks:
        observer = _RunObserver(observation, bar.update)
        for name, module in attention_modules(model).items():
            observation.attention[name] = AttentionStatistics()
            _watch_attention(name, module, observer, hooks)
        observe_steps(model, run, range(counted.steps), observer, calls_per_step, counted.calls)
    if not observation.inputs:
        raise ValueError(
            f"the run called the {type(model).__name__}, but none of its linear layers; layers whose weights are used "
            "without calling them cannot be analyzed, nor quantized"
        )
    observation.not_called = [name for name in layers if name not in observation.inputs]
    observation.attention = {name: found for name, found in observation.attention.items() if found.rows}
    return observation


def _watch_attention(name: str, module: nn.Module, observer: _RunObserver, hooks: ExitStack) -> None:
    """Hooks on both projections: whichever is called last completes the pair."""
    statistics = observer.observation.attention[name]
    projected: dict[str, torch.Tensor] = {}

    def keep(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            projected[part] = output
            if len(projected) == 2:
                with torch.inference_mode(False), torch.no_grad(), observer.not_finite(f"the attention {name}"):
                    statistics.add(projected["q"], projected["k"], module.heads)
                projected.clear()

        return hook

    hooks.callback(module.to_q.register_forward_hook(keep("q")).remove)
    hooks.callback(module.to_k.register_forward_hook(keep("k")).remove)
