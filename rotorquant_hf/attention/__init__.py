"""Attention that reads packed codes. Only `registered` knows Transformers."""
