"""A call of an op, written down once and repeated for inputs of the same kind.

What an op launches depends on what its tensors are like (shape, strides, dtype, device) and never on what they hold.
Checking them, choosing a configuration and describing launches takes the host longer than a GPU needs for many a layer;
so a call is recorded, as the operations of PyTorch and the launches of kernels that it comes to, and later ones repeat
these.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNMENT = 16  # of addresses: launches depend on whether they are its multiples
MOST_KEPT = 4096
DEVICES = {"cuda"}  # types; on others a kernel is no launch
ROOMS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_UNKNOWN, _SEEN = object(), object()

_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("ditq_recorder", default=None)
_tapes: dict[tuple[Any, ...], Any] = {}


def again(function: Callable[..., Any], chosen: Any, args: tuple) -> Any:
    """What :func:`repeated` returns where a call was recorded; None where not."""
    if args[0].device.type not in DEVICES:
        return None
    kind, tensors = _kind(function, chosen, args)
    tape = _tapes.get(kind)
    if type(tape) is not Tape:
        return None
    stream = tape.stream()
    return None if stream is None else tape.play(tensors, stream)


def repeated(function: Callable[..., Any], chosen: Any, *args: Any) -> Any:
    """``function(*args)``, by what was recorded of an earlier call where there is such: the first is not recorded, the
    second is.

    Args:
        function: launches what follows from ``chosen`` and the kind of its arguments; returns a tensor, or several.
        chosen: what else decides, such as the backend that is asked for.
        args: the first a tensor, the others tensors and values that can be compared.
    """
    if args[0].device.type not in DEVICES:
        return function(*args)
    kind, tensors = _kind(function, chosen, args)
    found = None if kind is None else _tapes.get(kind, _UNKNOWN)
    if type(found) is Tape:
        stream = found.stream()
        if stream is not None:
            if not torch._C._is_any_autocast_enabled():
                return found.play(tensors, stream)
            with torch.autocast(args[0].device.type, enabled=False):  # as where it was recorded
                return found.play(tensors, stream)
    elif found is _SEEN:
        result, _tapes[kind] = _record(function, args, tensors)
        return result
    elif found is _UNKNOWN:
        if len(_tapes) >= MOST_KEPT:
            _tapes.clear()
        _tapes[kind] = _SEEN
    return function(*args)


def _kind(function: Callable[..., Any], chosen: Any, args: tuple) -> tuple[tuple[Any, ...] | None, list[torch.Tensor]]:
    """(equal for calls that launch the same, None for one that is not to be repeated; the tensors among ``args``)."""
    key: list[Any] = [function, chosen]
    tensors, begin = [], []
    addresses = 0
    add, tensor = key.append, torch.Tensor
    for one in args:
        if isinstance(one, tensor):
            add(one.shape)
            add(one.stride())
            add(one.dtype)
            add(one.device)
            tensors.append(one)
            address = one.data_ptr()
            addresses |= address
            begin.append(address)
        else:
            add(one)
    if len(set(begin)) < len(begin):  # what begins at one place is told apart by it
        add(tuple([begin.index(one) for one in begin]))
    return (None if addresses % ALIGNMENT else tuple(key)), tensors


def forget() -> None:
    """Record again: what is launched has become another."""
    _tapes.clear()


class Launch:
    """A launch, to be repeated with other tensors.

    Attributes:
        run: called with ``head``, in which the stream takes the place STREAM, and ``arguments``.
        arguments: in the kernel's order; tensors among them are replaced, and descriptors of tensors, whose ``base``
            is one, made anew.
        stream: the stream that is current, if a launch may be repeated now; or None.
        listeners: to launches of this kernel; where there are some, they are to hear of it.
    """

    STREAM = 3

    def __init__(
        self,
        run: Callable[..., None],
        head: tuple[Any, ...],
        arguments: tuple[Any, ...],
        stream: Callable[[], int | None],
        listeners: list[Any],
    ) -> None:
        self.run, self.head, self.arguments, self.stream = run, head, arguments, stream
        self.listeners = listeners


def is_recording() -> bool:
    """Whether launches are to be noted."""
    return _recorder.get() is not None


def note(launch: Launch | None) -> None:
    """Write down what is launched, where a call is recorded; None: a launch that cannot be repeated."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.steps.append((launch, (), {}, None))


class _Recorder(TorchDispatchMode):
    """Writes operations down, as (what, args, kwargs, result), and launches as they are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result


def _record(function: Callable[..., Any], args: tuple, given: list[torch.Tensor]) -> tuple[Any, Any]:
    """(the result of a call; its tape if it can be repeated, _SEEN if perhaps another time, or None)."""
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        with recorder:
            result = function(*args)
    finally:
        _recorder.reset(token)
    launches = [what for what, *_ in recorder.steps if not isinstance(what, torch._ops.OpOverload)]
    if None in launches:  # perhaps for now only: somebody listens
        return result, _SEEN
    return result, Tape.of(given, recorder.steps, result) if launches else None


Places = list[torch.Tensor]  # that are given, then those for which room is made, then those that operations give
Step = Callable[[Places, int], None]


class Tape:
    """What a call does to tensors in their places."""

    def __init__(
        self,
        rooms: list[Callable[[], torch.Tensor]],
        steps: list[Step],
        result: int | tuple[int, ...],
        launches: list[Launch],
    ) -> None:
        self._rooms, self._steps, self._result = rooms, steps, result
        self._stream = launches[0].stream
        self._listeners = list({id(one.listeners): one.listeners for one in launches}.values())

    def stream(self) -> int | None:
        """As of :class:`Launch`; None if somebody listens to one of the kernels."""
        return None if any(self._listeners) else self._stream()

    def play(self, given: list[torch.Tensor], stream: int) -> Any:
        """Do it again, with ``given`` tensors of the same kind; what the call returned."""
        places = given + [room() for room in self._rooms]
        for step in self._steps:
            step(places, stream)
        result = self._result
        return places[result] if type(result) is int else tuple([places[one] for one in result])

    @classmethod
    def of(cls, given: list[torch.Tensor], steps: list[tuple[Any, tuple, dict, Any]], result: Any) -> Tape | None:
        """Of what was written down; None if it cannot be repeated."""
        rooms = [made for what, _, _, made in steps if _makes_room(what)]
        place = {id(one): number for number, one in reversed(list(enumerate([*given, *rooms])))}
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        instead: dict[int, torch.Tensor] = {}  # of a room, the view of all of it that is returned
        # Kernels are given addresses, and need not be told of views that begin where their tensor does.
        at = {one.data_ptr(): number for number, one in reversed(list(enumerate([*given, *rooms])))}
        read = _needed(steps, place, at, [])
        for one in results:
            for room in rooms:
                whole = one.is_contiguous() and room.is_contiguous() and one.numel() == room.numel()
                if one is not room and whole and one.data_ptr() == room.data_ptr() and id(room) not in read:
                    instead[id(room)] = one
                    place[id(one)] = place[id(room)]
        made: list[Step] = []
        needed = _needed(steps, place, at, results)
        for what, args, kwargs, gave in steps:
            if isinstance(what, Launch):
                step = _launch(what, place, at)
            elif _makes_room(what) or (_is_view(what) and id(gave) not in needed):
                continue
            else:
                step = _operation(what, args, kwargs, gave, place)
            if step is None:
                return None
            made.append(step)
        if any(id(one) not in place for one in results):
            return None
        numbers = tuple(place[id(one)] for one in results)
        return cls(
            [_room(instead.get(id(one), one)) for one in rooms],
            made,
            numbers[0] if isinstance(result, torch.Tensor) else numbers,
            [what for what, *_ in steps if isinstance(what, Launch)],
        )


def _makes_room(what: Any) -> bool:
    return isinstance(what, torch._ops.OpOverload) and what.overloadpacket.__name__ in ROOMS


def _is_view(what: Any) -> bool:
    return isinstance(what, torch._ops.OpOverload) and what.is_view


def _room(like: torch.Tensor) -> Callable[[], torch.Tensor]:
    # Of all ways to make room, the one that takes the host least; what it is made like has next to no memory.
    model = torch.empty((1,) * like.dim(), dtype=like.dtype, device=like.device).expand(like.shape)
    if torch.empty_like(model, device="meta").stride() == like.stride():
        return functools.partial(torch.empty_like, model)
    kind = dict(dtype=like.dtype, device=like.device)
    return functools.partial(torch.empty_strided, like.shape, like.stride(), **kind)


def _needed(
    steps: list[tuple[Any, tuple, dict, Any]], place: dict[int, int], at: dict[int, int], results: list[torch.Tensor]
) -> set[int]:
    """Identities of what is read as it is: by operations, by kernels that begin elsewhere in it, or as a result."""
    needed = {id(one) for one in results if id(one) not in place}
    for what, args, kwargs, gave in reversed(steps):
        if isinstance(what, Launch):
            bases = (getattr(one, "base", one) for one in what.arguments)
            needed |= {id(one) for one in bases if isinstance(one, torch.Tensor) and one.data_ptr() not in at}
        elif not _is_view(what) or id(gave) in needed:
            needed |= {id(one) for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)}
    return needed


def _launch(launch: Launch, place: dict[int, int], at: dict[int, int]) -> Step | None:
    template = [*launch.head, *launch.arguments]
    tensors: list[tuple[int, int]] = []
    descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
    for number, one in enumerate(template):
        base = getattr(one, "base", one)
        if not isinstance(base, torch.Tensor):
            continue
        found = at.get(base.data_ptr(), place.get(id(base)))
        if found is None:
            return None
        template[number] = None
        if base is one:
            tensors.append((number, found))
        else:
            descriptors.append((number, found, type(one), {**vars(one), "base": None}))
    run = launch.run

    def step(places: Places, stream: int) -> None:
        arguments = template.copy()
        arguments[Launch.STREAM] = stream
        for number, found in tensors:
            arguments[number] = places[found]
        for number, found, kind, parts in descriptors:
            arguments[number] = made = kind.__new__(kind)
            made.__dict__.update(parts)
            made.base = places[found]
        run(*arguments)

    return step


def _operation(what: Any, args: tuple, kwargs: dict, gave: Any, place: dict[int, int]) -> Step | None:
    inner = [one for one in (*args, *kwargs.values()) if isinstance(one, (list, tuple, dict))]
    if any(isinstance(one, torch.Tensor) for one in tree_leaves(inner)):
        return None
    names = (*range(len(args)), *kwargs)
    values = (*args, *kwargs.values())
    reads = {
        name: place.get(id(one), -1) for name, one in zip(names, values, strict=True) if isinstance(one, torch.Tensor)
    }
    if -1 in reads.values() or not (gave is None or isinstance(gave, torch.Tensor)):
        return None
    args = tuple(None if name in reads else one for name, one in enumerate(args))
    kwargs = {name: None if name in reads else one for name, one in kwargs.items()}
    keeps = isinstance(gave, torch.Tensor) and id(gave) not in place
    if keeps:
        place[id(gave)] = 1 + max(place.values())

    def step(places: Places, stream: int) -> None:
        positional = [places[reads[name]] if name in reads else one for name, one in enumerate(args)]
        named = {name: places[reads[name]] if name in reads else one for name, one in kwargs.items()}
        result = what(*positional, **named)
        if keeps:
            places.append(result)

    return step
