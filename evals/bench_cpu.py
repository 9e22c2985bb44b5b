"""Moved: `python -m evals.bench.cpu`."""

from .moved import run

if __name__ == "__main__":
    run("bench_cpu", "bench.cpu")
