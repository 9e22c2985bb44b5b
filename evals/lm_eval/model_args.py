"""What `--model_args` of the model `rotorquant` may say: options of the cache, and HFLM's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..caches.registry import CacheSpec, option_texts
from ..errors import InputError, require

CHUNK = 64  # tokens of a pass through a compressed cache, unless told otherwise
_WHERE = "--model_args"
_LIKE = 0.8  # of difflib's ratio: from here on a name is taken for a slip of the pen

CACHE_OPTIONS = ("preset", "label", *option_texts())


def cache_of(
    cache: str | CacheSpec, arguments: Mapping[str, Any]
) -> tuple[CacheSpec, dict[str, Any]]:
    """The cache that the arguments describe, and the arguments that are not its options.

    Raises:
        InputError: for a cache, an option or a value that there is not.
    """
    own = {name: value for name, value in arguments.items() if name in CACHE_OPTIONS}
    rest = {name: value for name, value in arguments.items() if name not in own}
    if isinstance(cache, CacheSpec):
        require(not own, f"{', '.join(own)} given beside a cache that is made already")
        return cache, rest
    require(isinstance(cache, str), f"{_WHERE}: cache is {cache!r}; it takes a name")
    return CacheSpec.of(cache, own, _WHERE), rest


def chunk_of(chunk: Any, spec: CacheSpec) -> int | None:
    """Most tokens of a pass; None for one pass over all, the default of the baseline.

    Raises:
        InputError: unless it is a positive whole number, or None.
    """
    if chunk is None:
        return None if spec.is_baseline else CHUNK
    require(
        type(chunk) is int and chunk >= 1,
        f"{_WHERE}: chunk is {chunk!r}; choose a whole number of tokens of at least 1",
    )
    return chunk


def check_names(names: Iterable[str], known: Iterable[str], loaded: bool) -> None:
    """Refuse arguments that nothing reads.

    HFLM hands what it does not know to `from_pretrained`, or, where the model is loaded already,
    to nobody: a misspelt `key_bit=3` would measure another cache than the one asked for.

    Args:
        names: arguments that are no options of the cache.
        known: HFLM's own parameters.
        loaded: whether the model is loaded already, so that `from_pretrained` is not called.

    Raises:
        InputError: naming the argument and those that are spelt alike.
    """
    there_are = [*CACHE_OPTIONS, "cache", "chunk", *known]
    for name in names:
        if name in there_are:
            continue
        alike = difflib.get_close_matches(name, there_are, n=3, cutoff=_LIKE)
        if len(name) > 3:  # `bits` is part of key_bits and value_bits
            alike += [option for option in CACHE_OPTIONS if name in option and option not in alike]
        require(not alike, f"{_WHERE}: unknown option {name!r}; did you mean {' or '.join(alike)}?")
        require(not loaded, f"unknown option {name!r}: the model is loaded already")


def refused(name: str, error: Exception) -> InputError:
    """What to say of an argument that `from_pretrained` does not take."""
    return InputError(
        f"{_WHERE}: unknown option {name!r}: no option of the cache ({', '.join(CACHE_OPTIONS)}), "
        f"nor of HFLM, nor of the model ({error})"
    )
