"""Moved: `python -m evals.bench.attention`."""

from .moved import run

if __name__ == "__main__":
    run("bench_attention", "bench.attention")
