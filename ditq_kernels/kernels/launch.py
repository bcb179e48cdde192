"""Launching a kernel again without asking Triton once more what it found out the first time.

Triton's own launch binds arguments by name, reads settings from the environment and describes every argument to find
what was compiled for them: half of what a quantized layer costs the host. What was compiled depends on less than that,
and the second launch of the same goes to it at once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from ..layer import tape
from .interpreter import interpreting

ALIGNMENT = 16  # of addresses: what is compiled knows whether they are its multiples
MOST_KEPT = 4096
# What was compiled, the constants' values in the kernel's order, and the objects whose identities the key holds.
_kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}


def _is_heard() -> bool:
    """Whether somebody listens to all launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _key(
    kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """Equal for launches of what was compiled for one of them; None for what is left to Triton: its interpreter,
    addresses that are not aligned, and who listens to launches.
    """
    if interpreting():
        return None
    if _is_heard() or kernel.pre_run_hooks:
        return None
    active = driver.active
    key: list[Any] = [active.get_current_device(), id(active), id(kernel), id(constants), id(options)]
    addresses = 0
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            addresses |= argument.data_ptr()
            key.append(argument.dtype)
        elif isinstance(argument, int) or argument is None:
            key.append(argument)  # the value: 1 and multiples of 16 are compiled for
        elif isinstance(argument, float):
            key.append(float)
        else:  # a descriptor, whose address is aligned
            key.append((argument.base.dtype, *argument.block_shape))
    return None if addresses % ALIGNMENT else tuple(key)


def _stream(device: int, active: Any) -> int | None:
    """The current stream of ``device``, if that is the current device and nobody listens to launches; or None."""
    if _is_heard() or driver.active is not active or active.get_current_device() != device:
        return None
    return active.get_current_stream(device)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """``kernel[grid](*arguments, **constants, **options)``, on the current device and stream.

    Args:
        arguments: all that are no compile-time constants, in the kernel's order: tensors, descriptors, numbers, None.
        constants, options: the same objects whenever they hold the same: they are told apart by identity.
    """
    key = _key(kernel, arguments, constants, options)
    kept = None if key is None else _kept.get(key)
    if kept is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        if key is not None and compiled is not None:  # a hook may keep Triton from compiling
            if len(_kept) >= MOST_KEPT:
                _kept.clear()
            values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            _kept[key] = compiled, values, (driver.active, kernel, constants, options)
        tape.note(None)
        return
    compiled, values, _ = kept
    stream = driver.active.get_current_stream(key[0])
    hooks = (None, None, None)  # what a launch tells of itself, and who is told before and after
    head = *grid, *(1,) * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata, *hooks
    compiled.run(*head, *arguments, *values)
    if tape.is_recording():
        again = functools.partial(_stream, key[0], driver.active)
        tape.note(tape.Launch(compiled.run, head, (*arguments, *values), again, kernel.pre_run_hooks))
