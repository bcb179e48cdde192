"""What DiT's blocks are conditioned by, computed by the first for all: each has an embedding of the timestep and the
class of its own (diffusers' ``CombinedTimestepLabelEmbeddings``), and in published checkpoints they are equal copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import _len_torch_dispatch_stack

from ..substituted_class import class_before
from .block import FusedBlock

_SHARED = "_ditq_conditioning"  # where an embedding keeps (a Conditioning, its place among the members)
_PLAIN = (nn.Linear, nn.Embedding)
_LAYERS = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder.embedding_table")
_SINUSOIDS = ("num_channels", "flip_sin_to_cos", "downscale_freq_shift", "scale")


class _Given(NamedTuple):
    """What an embedding is given, and how often that was written to."""

    timestep: torch.Tensor
    class_labels: torch.Tensor
    versions: tuple[int | None, ...]
    dtype: torch.dtype | None
    is_captured: bool

    def is_same(self, other: _Given) -> bool:
        same = self.timestep is other.timestep and self.class_labels is other.class_labels
        return same and self[2:] == other[2:]


class Conditioning:
    """What equal embeddings share: the first of the members computes, and each of the others takes it once; then the
    first one, which DiT asks again behind its blocks.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self._equal: dict[int, tuple[tuple[Any, ...], bool]] = {}  # by a member's place: of which weights it was asked
        self._clear()

    def _clear(self) -> None:
        self._kept: tuple[_Given, torch.Tensor] | None = None
        self._waiting: set[int] = set()

    def keep(self, given: _Given, found: torch.Tensor) -> None:
        """The first one has computed ``found``."""
        self._kept, self._waiting = (given, found), set(range(1, len(self.members)))

    def take(self, place: int, given: _Given) -> torch.Tensor | None:
        """What the first one found, if the member at ``place`` has not had it, is given the same, and is equal."""
        if self._kept is None or not self._kept[0].is_same(given):
            return None
        found = self._kept[1]
        if place:
            is_due = place in self._waiting and self._is_equal(place, given.is_captured)
            self._waiting.discard(place)
            return found if is_due else None
        if self._waiting or None in given.versions:  # a call of the model begins, or may
            return None
        self._clear()
        return found

    def _is_equal(self, place: int, is_captured: bool) -> bool:
        """Whether a member's weights are those of the first; compared anew where one was written to, or moved."""
        weights = _weights(self.members[0]), _weights(self.members[place])
        if not all(type(weight) is nn.Parameter and not weight.is_meta for both in weights for weight in both):
            return False
        where = *map(_where, weights[0]), *map(_where, weights[1])
        known = self._equal.get(place)
        if known is None or known[0] != where:
            if is_captured or _len_torch_dispatch_stack():  # what is captured or looked at compares nothing
                return False
            agree = len(weights[0]) == len(weights[1]) and all(map(_agree, *weights))
            known = self._equal[place] = where, agree
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(Conditioning(self.members))  # a copy has weights of its own, and was given nothing


def _layers(module: nn.Module) -> tuple[nn.Module, ...]:
    embedder = module.timestep_embedder
    return embedder.linear_1, embedder.linear_2, module.class_embedder.embedding_table


def _weights(module: nn.Module) -> list[torch.Tensor | None]:
    """All that the layers have; of one with an adapter, none."""
    return [
        weight
        for layer in _layers(module)
        for weight in (layer._parameters.values() if type(layer) in _PLAIN else (None,))
    ]


def _where(weight: torch.Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, _version(weight)


def _version(tensor: torch.Tensor | None) -> int | None:
    """How often it was written to, if that is counted."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape and (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    )


def share(model: nn.Module) -> None:
    """Let the embeddings in the blocks of ``model`` be computed once a call, if there are several that may be equal."""
    found = [one for one in model.modules() if type(one).__name__ == CONDITIONING.name and _is_known(one)]
    if found:
        alike = [one for one in found if _sinusoids(one) == _sinusoids(found[0])]
        conditioning = Conditioning(alike)
        for place, module in enumerate(alike):
            vars(module)[_SHARED] = conditioning, place


def part(model: nn.Module) -> None:
    """Undo :func:`share`."""
    for module in model.modules():
        vars(module).pop(_SHARED, None)


def _sinusoids(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module.time_proj, name) for name in _SINUSOIDS)


def _is_known(module: nn.Module) -> bool:
    embedder = module.timestep_embedder
    plain = getattr(embedder, "cond_proj", None) is None and getattr(embedder, "post_act", None) is None
    return plain and type(embedder.act) is nn.SiLU and all(type(layer) in _PLAIN for layer in _layers(module))


def _forward(
    module: nn.Module,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    hidden_dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    shared, place = vars(module).get(_SHARED, (None, 0))
    if shared is None or torch.compiler.is_compiling() or shared.members[place] is not module:  # but a copy of it
        return None
    is_captured = timestep.is_cuda and torch.cuda.is_current_stream_capturing()
    versions = _version(timestep), _version(class_labels)
    given = _Given(timestep, class_labels, versions, hidden_dtype, is_captured)
    found = shared.take(place, given)
    if found is None and not place:
        found = class_before(type(module)).forward(module, timestep, class_labels, hidden_dtype=hidden_dtype)
        shared.keep(given, found)
    return found


CONDITIONING = FusedBlock(
    "CombinedTimestepLabelEmbeddings",
    ("timestep", "class_labels", "hidden_dtype"),
    _is_known,
    ("time_proj", "timestep_embedder", "timestep_embedder.act", "class_embedder", *_LAYERS),
    _forward,
)
