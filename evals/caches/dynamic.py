"""Transformers' `DynamicCache`, uncompressed: what the others are compared with."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig

from .base import Kind


class Dynamic(Kind):
    """Full precision. Caches that no other kind knows are counted as this one is."""

    def make(self, options: Any, config: PreTrainedConfig) -> Cache:
        """As `Kind.make`."""
        return DynamicCache(config=config)


DYNAMIC = Dynamic("dynamic", "Transformers' DynamicCache, uncompressed: the baseline")
