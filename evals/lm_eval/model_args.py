"""What `--model_args` of the model `rotorquant` may say: options of the cache, and HFLM's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..caches.registry import CacheSpec, option_texts
from ..errors import InputError, require

CHUNK = 64  # tokens of a pass through a compressed cache, unless told otherwise
_WHERE = "--model_args"
_MIN_LIKENESS = 0.8  # of difflib's ratio: a name this like an option's is taken for a misspelling

CACHE_OPTIONS = ("preset", "label", *option_texts())


def cache_of(
    cache: str | CacheSpec, arguments: Mapping[str, Any]
) -> tuple[CacheSpec, dict[str, Any]]:
    """The cache that the arguments describe, and the arguments that are not its options.

    Raises:
        InputError: for an unknown cache or option, or a bad value.
    """
    own = {name: value for name, value in arguments.items() if name in CACHE_OPTIONS}
    rest = {name: value for name, value in arguments.items() if name not in own}
    if isinstance(cache, CacheSpec):
        require(not own, f"{', '.join(own)} given beside a cache that is made already")
        return cache, rest
    require(isinstance(cache, str), f"{_WHERE}: cache is {cache!r}; it takes a name")
    return CacheSpec.of(cache, own, _WHERE), rest


def chunk_of(chunk: Any, spec: CacheSpec) -> int | None:
    """Max tokens per pass; None for one pass over all, the default of the baseline.

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
    """Refuse unknown arguments.

    HFLM hands what it does not know to `from_pretrained`, or drops it where the model is loaded
    already: a misspelt `key_bit=3` would measure another cache than the one asked for.

    Args:
        names: arguments that are not options of the cache.
        known: HFLM's own parameters.
        loaded: whether the model is loaded already, so that `from_pretrained` is not called.

    Raises:
        InputError: naming the argument and options with similar names.
    """
    options = [*CACHE_OPTIONS, "cache", "chunk", *known]
    for name in names:
        if name in options:
            continue
        alike = difflib.get_close_matches(name, options, n=3, cutoff=_MIN_LIKENESS)
        if len(name) > 3:  # `bits` is part of key_bits and value_bits
            alike += [option for option in CACHE_OPTIONS if name in option and option not in alike]
        require(not alike, f"{_WHERE}: unknown option {name!r}; did you mean {' or '.join(alike)}?")
        require(not loaded, f"unknown option {name!r}: the model is loaded already")


def refused(name: str, error: Exception) -> InputError:
    """The error for an argument that `from_pretrained` refuses."""
    return InputError(
        f"{_WHERE}: unknown option {name!r}: it is not one of the cache "
        f"({', '.join(CACHE_OPTIONS)}), of HFLM or of the model ({error})"
    )
