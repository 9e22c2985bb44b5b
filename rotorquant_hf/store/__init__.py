"""One layer's packed keys and values."""

from rotorquant_hf.store.kv_store import RotorQuantKVCache

__all__ = ["RotorQuantKVCache"]
