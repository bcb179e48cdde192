"""Triton's interpreter, without what it does again and again or for nobody: the same results in half the time."""

import functools

from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_replace, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_check_overflow, _dtype_of = TritonSemantic.binary_op_sanitize_overflow_impl, interpreter._get_np_dtype
_replaced: set[int] | None = None  # modules, while a kernel runs


def _replace_once(function):
    """Whenever a kernel calls a function of its own, it replaces the functions of its language. Once in a launch is
    enough, for each module that such functions come from.
    """
    module = id(function.__globals__)
    if _replaced is not None and module in _replaced:
        return None
    if _replaced is not None:
        _replaced.add(module)
    return _replace(function)


def _launch_anew(self, *args, **kwargs):
    global _replaced
    before, _replaced = _replaced, set()
    try:
        return _launch(self, *args, **kwargs)
    finally:
        _replaced = before


def _check_overflow_if_it_is_said(self, *args):
    """Sums and products of integers are computed again in 64 bits, for an assertion that only debugging looks at."""
    if self.builder.options.debug:
        _check_overflow(self, *args)


_dtype_of_number = functools.cache(_dtype_of)


def _dtype_once(dtype):
    """It makes a table of all types for each look into it."""
    scalar = dtype.scalar
    return _dtype_of(scalar) if scalar.is_ptr() else _dtype_of_number(scalar)


def install() -> None:
    interpreter._patch_lang = _replace_once
    interpreter.GridExecutor.__call__ = _launch_anew
    interpreter._get_np_dtype = _dtype_once
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow_if_it_is_said
