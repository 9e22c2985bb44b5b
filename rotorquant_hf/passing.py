"""The name by which models take a cache: "cache" from Transformers 5.24 on.

Before that it was "past_key_values", which models take with a warning until 5.40, and `generate`
until 6.0.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

OLD_NAME = "past_key_values"
_takes = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _takes else OLD_NAME


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of a model or its `generate`: {name: cache}.

    By the old name also for a model whose own code takes no other.
    """
    takes = inspect.signature(model.forward).parameters
    return {OLD_NAME if OLD_NAME in takes else CACHE_NAME: cache}
