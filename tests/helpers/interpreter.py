"""Triton's interpreter, without work that it does again and again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Let the functions that a kernel calls find Triton's language as the launch has made it.

    At a launch the interpreter puts its own functions in the place of Triton's. It does so again at
    every call of another function within, to the same effect: a sixth of a small kernel's time.
    """
    if not hasattr(interpreter, "_patch_lang"):  # another Triton may do otherwise
        return
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
