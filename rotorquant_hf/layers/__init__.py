"""One layer of the cache, of full or of sliding-window attention."""

from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer

__all__ = ["RotorQuantLayer", "RotorQuantSlidingLayer"]
