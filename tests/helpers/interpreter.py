"""Triton's interpreter, without work that it does again and again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what changes nothing: two thirds of a small kernel's time.

    - At a launch the interpreter puts its own functions in the place of Triton's language, and does
      so again at every call of another function within.
    - Every sum, difference and product of integers is computed once more in 64 bits, for an
      assertion that they do not overflow, which then is only made where `debug` is set.
    - The type and the shape of every tensor are made anew, and operands of one type are cast and
      broadcast to it.
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
    _remember_types()
    _remember_shapes()
    _remember_dtypes()
    _pass_operands_of_one_type()


@functools.cache
def _languages(fn: Callable[..., Any]) -> list[ModuleType]:
    """What a function knows Triton's language by."""
    known = {id(x) for x in fn.__globals__.values()}
    return [x for x in (tl, tl.core) if id(x) in known]


def _is_prepared(language: ModuleType) -> bool:
    ours = language.load, language.tensor.__add__
    return not any(map(tl.core.is_builtin, ours))


def _remember_types() -> None:
    make, made = tl.block_type.__init__, dict[Any, dict[str, Any]]()

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        kind = element_ty.name, *(x if type(x) is int else x.value for x in shape)
        if kind not in made:
            make(self, element_ty, shape)
            made[kind] = dict(vars(self))
        vars(self).update(made[kind], element_ty=element_ty)

    tl.block_type.__init__ = remembered


def _remember_shapes() -> None:
    """Those of tensors, which are constants of the language."""
    make, made = tl.tensor.__init__, dict[Any, dict[str, Any]]()

    def remembered(self: Any, handle: Any, type: Any) -> None:
        kind = tuple(type.shape) if type.is_block() else ()
        if kind not in made:
            make(self, handle, type)
            made[kind] = {name: vars(self)[name] for name in ("shape", "numel")}
        vars(self).update(made[kind], handle=handle, type=type, dtype=type.scalar)

    tl.tensor.__init__ = remembered


def _remember_dtypes() -> None:
    """Those of NumPy."""
    find, found = interpreter._get_np_dtype, dict[Any, np.dtype]()

    def remembered(ty: Any) -> np.dtype:
        name = ty.scalar.name
        if name not in found:
            found[name] = find(ty)
        return found[name]

    interpreter._get_np_dtype = remembered


def _pass_operands_of_one_type() -> None:
    check = TritonSemantic.binary_op_type_checking_impl

    def checked(self: Any, lhs: Any, rhs: Any, *args: Any, **options: Any) -> Any:
        divides = len(args) > 3 or options  # which has rules of its own
        if divides or not (isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)):
            return check(self, lhs, rhs, *args, **options)
        if lhs.type.name != rhs.type.name or lhs.dtype.is_ptr():
            return check(self, lhs, rhs, *args, **options)
        return lhs, rhs

    TritonSemantic.binary_op_type_checking_impl = checked
