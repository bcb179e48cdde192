"""Calls repeated by what was recorded of them: right for other data, and nothing is repeated that is another call."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from ditq_kernels.layer import tape

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(tape, "DEVICES", {"cpu"})
    tape.forget()
    yield
    tape.forget()


launches = []


def kernel(name, source, target, head=(0, 0, 0, 7), stream=lambda: 7, listeners=()):
    """Doubles one tensor into another, of which it is told, as a kernel is, where they begin and how they are laid out;
    and says what it was launched with.
    """

    def run(*arguments):
        *_, source, target, shape, stride, target_stride = arguments
        launches.append((name, arguments[: len(head)]))
        source, target = (
            torch.as_strided(one, shape, by, one.storage_offset())
            for one, by in ((source, stride), (target, target_stride))
        )
        torch.mul(source, 2, out=target)

    arguments = source, target, source.shape, source.stride(), target.stride()
    run(*head, *arguments)
    tape.note(tape.Launch(run, head, arguments, stream, listeners))


def doubled(x, extra=None):
    y = torch.empty(x.shape[0] * 2, x.shape[1])[: x.shape[0]]
    kernel("double", x, y)
    return y


def twice_doubled(x, bias, times):
    rows = x.reshape(-1, x.shape[-1])
    between, y = torch.empty_like(rows), rows.new_empty(rows.shape)
    kernel("first", rows, between)
    between = torch.relu(between)
    between.add_(bias)
    kernel("second", between, y)
    return y.view(x.shape), between


def expected(x, bias):
    between = torch.relu(2 * x) + bias
    return 2 * between, between.view(-1, x.shape[-1])


def test_the_third_call_repeats_the_second():
    bias = torch.arange(4.0)
    for turn in range(5):
        launches.clear()
        x = torch.randn(2, 3, 4)
        for one, other in zip(tape.repeated(twice_doubled, None, x, bias, 1), expected(x, bias), strict=True):
            assert torch.equal(one, other) and one.shape == other.shape
        assert [name for name, _ in launches] == ["first", "second"]
        found = tape.again(
            twice_doubled,
            None,
            (
                x,
                bias,
                1,
            ),
        )
        assert (found is None) == (turn == 0)
    assert sum(type(one) is tape.Tape for one in tape._tapes.values()) == 1


def test_the_stream_is_the_current_one():
    streams = iter([1, 2, 3])

    def call(x):
        y = torch.empty_like(x)
        kernel("double", x, y, stream=lambda: next(streams))
        return y

    for _ in range(4):
        launches.clear()
        assert torch.equal(tape.repeated(call, None, torch.ones(2, 2)), torch.full((2, 2), 2.0))
        head = launches[0][1]
    assert head == (0, 0, 0, 2)


def test_other_kinds_are_other_calls():
    made = []

    def call(x, extra):
        made.append(tuple(x.shape))
        y = torch.empty_like(x)
        kernel("double", x, y)
        return y

    x = torch.randn(4, 8)
    kinds = [
        (x, None),
        (x[:2], None),
        (x.t(), None),
        (x.double(), None),
        (x, 1),
        (x, x),
        (x, x[:, :4]),
    ]
    for args in kinds:
        for turn in range(4):
            made.clear()
            assert torch.equal(tape.repeated(call, None, *args), 2 * args[0])
            assert bool(made) == (turn < 2)
    assert torch.equal(tape.repeated(call, None, torch.empty(0, 8), None), torch.empty(0, 8))


def test_what_is_not_repeated():
    calls = []

    def call(x, kind):
        calls.append(kind)
        y = torch.empty_like(x)
        if kind == "list":
            y = torch.cat([x, x])[: len(x)] * 1
            kernel("double", x, y)
            return torch.cat([y, y])
        if kind == "unknown":
            torch.mul(x, 2, out=y)
            tape.note(None)
        elif kind == "nothing":
            torch.mul(x, 2, out=y)
        elif kind == "kept":
            kernel("double", kept, y)
        else:
            kernel("double", x, y, stream=lambda: None)
        return y

    kept = torch.randn(4, 4)
    for kind in ("list", "unknown", "nothing", "kept", "heard"):
        calls.clear()
        for _ in range(4):
            tape.repeated(call, None, torch.randn(4, 4), kind)
        assert calls == [kind] * 4
    calls.clear()
    flat = torch.randn(17)
    for _ in range(4):
        tape.repeated(call, None, flat[1:].view(4, 4), "heard")  # no multiple of 16
    assert len(calls) == 4


def test_views_that_begin_elsewhere():
    def call(x):
        y = torch.empty(2, len(x), 4)
        kernel("double", x[:, 4:], y[1])
        kernel("double", x[:, :4], y[0])
        return y

    for _ in range(4):
        x = torch.randn(3, 8)
        found = tape.repeated(call, None, x)
        assert torch.equal(found, 2 * torch.stack([x[:, :4], x[:, 4:]]))
    assert any(type(one) is tape.Tape for one in tape._tapes.values())


def test_a_result_that_is_part_of_what_was_made():
    for _ in range(4):
        x = torch.randn(3, 4)
        assert torch.equal(tape.repeated(doubled, None, x, None), 2 * x)


def test_a_result_whose_parts_are_written_one_by_one():
    """As where a weight is decoded by stretches: outputs are columns, whatever shape the result has."""

    def call(x):
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(rows.shape)
        kernel("first", rows[:, :4], y[:, :4])
        kernel("second", rows[:, 4:], y[:, 4:])
        torch.add(y[:, :4], 1, out=y[:, :4])
        return y.view(x.shape)

    for turn in range(5):
        x = torch.randn(2, 3, 8)
        found = tape.repeated(call, None, x)
        assert torch.equal(found, torch.cat([2 * x[..., :4] + 1, 2 * x[..., 4:]], -1)) and found.shape == x.shape
        assert (tape.again(call, None, (x,)) is None) == (turn == 0)


def test_arguments_that_begin_at_one_place():
    def call(x, one, other):
        y = torch.empty_like(x)
        kernel("double", one, y)
        z = torch.empty_like(x)
        kernel("double", other, z)
        return y - z

    x, same = torch.randn(2, 4), torch.randn(2, 4)
    for _ in range(3):
        assert not tape.repeated(call, None, x, same, same).any()
    for _ in range(3):
        one, other = torch.randn(2, 4), torch.randn(2, 4)
        assert torch.equal(tape.repeated(call, None, x, one, other), 2 * one - 2 * other)


def test_nothing_of_the_recorded_call_is_held():
    gone = []
    for turn in range(3):
        x, bias = torch.randn(3, 4), torch.randn(4)
        for name, one in (("x", x), ("bias", bias)):
            weakref.finalize(one, gone.append, name)
        found = tape.repeated(call_with_descriptor, None, x, bias)
        assert torch.equal(found, 2 * x + bias)
        del x, bias, found, one
        gc.collect()
        assert gone.count("x") == gone.count("bias") == turn + 1


class Descriptor:
    def __init__(self, base):
        self.base = base


def call_with_descriptor(x, bias):
    y = torch.empty_like(x)

    def run(*arguments):
        *_, described, target = arguments
        torch.mul(described.base, 2, out=target)

    head, arguments = (0, 0, 0, 7), (Descriptor(x), y)
    run(*head, *arguments)
    tape.note(tape.Launch(run, head, arguments, lambda: 7, ()))
    return torch.add(y, bias) * 1


def test_who_listens_hears_of_every_launch():
    listeners = []

    def call(x):
        calls.append(x)
        y, z = torch.empty_like(x), torch.empty_like(x)
        kernel("first", x, y)
        kernel("second", y, z, listeners=listeners)
        return z

    calls = []
    for turn in range(6):
        calls.clear()
        listeners[:] = [print] if turn == 4 else []
        x = torch.randn(2, 4)
        assert torch.equal(tape.repeated(call, None, x), 4 * x)
        assert bool(calls) == (turn in (0, 1, 4))


def test_a_launch_that_cannot_be_repeated_now_may_be_later():
    unknown, calls = [True], []

    def call(x):
        calls.append(x)
        y = torch.empty_like(x)
        kernel("double", x, y)
        if unknown:
            tape.note(None)
        return y

    for turn in range(6):
        calls.clear()
        if turn == 3:
            unknown.clear()
        tape.repeated(call, None, torch.randn(2, 4))
        assert bool(calls) == (turn < 4)


def test_recording_takes_no_more_memory(monkeypatch):
    made = []
    monkeypatch.setattr(
        tape.torch, "empty", lambda *args, of=torch.empty, **kwargs: made.append(of(*args, **kwargs)) or made[-1]
    )

    def call(x):
        y = torch.empty(1000, 4)
        kernel("double", x, y)
        return y

    for _ in range(2):
        tape.repeated(call, None, torch.randn(1000, 4))
    assert [one.untyped_storage().nbytes() for one in made] == [16000, 16000, 4]


def test_autocast_is_outside():
    def call(x):
        y = torch.empty(4, 4)
        kernel("double", x, y)
        return torch.mm(y, y)

    def computed(x):
        with torch.autocast("cpu", enabled=False):
            return call(x)

    for _ in range(4):
        x = torch.randn(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            found = tape.repeated(computed, None, x)
        assert found.dtype == torch.float32 and torch.equal(found, torch.mm(2 * x, 2 * x))


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(tape, "MOST_KEPT", 3)
    for rows in range(1, 9):
        for _ in range(2):
            tape.repeated(doubled, None, torch.randn(rows, 4), None)
    assert len(tape._tapes) <= 3


def test_nothing_is_recorded_elsewhere(monkeypatch):
    monkeypatch.setattr(tape, "DEVICES", {"cuda"})
    for _ in range(3):
        tape.repeated(doubled, None, torch.randn(2, 4), None)
    assert not tape._tapes and tape.again(doubled, None, (torch.randn(2, 4), None)) is None
