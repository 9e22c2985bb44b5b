"""Layers of the cache, in Transformers' protocol."""

from rotorquant_hf.layers.full import RotorQuantLayer, RotorQuantSlidingLayer

__all__ = ["RotorQuantLayer", "RotorQuantSlidingLayer"]
