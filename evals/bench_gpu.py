"""Moved: `python -m evals.bench.gpu`."""

from .moved import run

if __name__ == "__main__":
    run("bench_gpu", "bench.gpu")
