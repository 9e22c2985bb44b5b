"""How large the cache of a model of a given shape is, measured on real tensors.

    python -m evals.bench.cache_size --tokens 32768

Fills one layer with random keys and values of the shape in one update, as a prompt does, and reads
`cache.memory()`. Every layer of a model takes the same again; the tables are shared by all.
"""

from __future__ import annotations

import argparse

import torch

from rotorquant_hf import PRESETS, RotorQuantCache


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row per preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="kv heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS)[:6], choices=list(PRESETS))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = (args.batch, args.heads, args.tokens, args.head_dim)
    keys = torch.randn(shape, dtype=getattr(torch, args.dtype), device=args.device)
    values = torch.randn_like(keys)
    print(f"One layer: {shape} keys and values in {args.dtype}, {2 * keys.nbytes:,} bytes")
    print("\n| preset | bytes | smaller | bits/number | spare | quantised tokens alone |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for preset in args.presets:
        cache = RotorQuantCache(preset)
        cache.update(keys, values, 0)
        report = cache.memory()
        print(
            f"| {preset} | {report.total_bytes:,} | {report.ratio:.2f}x | "
            f"{report.bits_per_number:.2f} | {report.parts['spare'] / report.total_bytes:.1%} | "
            f"{report.packed_ratio:.2f}x |"
        )


if __name__ == "__main__":
    main()
