"""Triton's interpreter, without work that it does again and again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what changes nothing: half of a small kernel's time.

    - At a launch the interpreter puts its own functions in the place of Triton's language, and does
      so again at every call of another function within.
    - Every sum, difference and product of integers is computed once more in 64 bits, for an
      assertion that they do not overflow, which then is only made where `debug` is set.
    """
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return  # another Triton may do otherwise
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    prepare = interpreter._patch_lang

    def prepare_once(fn: Callable[..., Any]) -> Any:
        if all(map(_is_prepared, _languages(fn))):
            return interpreter._LangPatchScope()
        return prepare(fn)

    interpreter._patch_lang = prepare_once


@functools.cache
def _languages(fn: Callable[..., Any]) -> list[ModuleType]:
    """What a function knows Triton's language by."""
    known = {id(x) for x in fn.__globals__.values()}
    return [x for x in (tl, tl.core) if id(x) in known]


def _is_prepared(language: ModuleType) -> bool:
    ours = language.load, language.tensor.__add__
    return not any(map(tl.core.is_builtin, ours))
