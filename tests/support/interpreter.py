"""Triton's interpreter without what takes most of its time and says nothing about our kernels."""
import dataclasses
from typing import Any, Set

__all__ = ['interpret_fast']


def interpret_fast() -> None:
    """Let Triton's interpreter prepare its language once per launch and module, and not look for integer overflow.

    A launch replaces the functions of `triton.language` before its first program, and puts them back after its last
    one. Every call of a device function replaces those that its module sees once more, which takes a millisecond. Each
    sum of integers is made in 64 bits too; the tests of maps beyond 2^31 pixels check places, and need no such check.
    """
    from triton.runtime import interpreter

    prepare, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: Set[int] = set()

    def prepare_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in prepared:
            return None
        prepared.add(module)
        return prepare(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
