"""Moved: `python -m evals.bench.kernel_cost`."""

from .moved import run

if __name__ == "__main__":
    run("kernel_cost", "bench.kernel_cost")
