"""Moved: `python -m evals.bench.cache_size`."""

from .moved import run

if __name__ == "__main__":
    run("cache_size", "bench.cache_size")
