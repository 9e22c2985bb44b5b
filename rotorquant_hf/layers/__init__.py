"""One layer of the cache: full or sliding-window attention, alone or beside recurrent states."""

from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer, RotorQuantHybridSlidingLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer

__all__ = [
    "RotorQuantHybridLayer",
    "RotorQuantHybridSlidingLayer",
    "RotorQuantLayer",
    "RotorQuantSlidingLayer",
]
