"""Moved: `python -m evals.bench.generate`."""

from .moved import run

if __name__ == "__main__":
    run("bench_generate", "bench.generate")
