"""Measurements of the compressed cache. Run from the repository root: `python -m evals.<name>`."""
