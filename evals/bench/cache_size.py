"""How large the cache of a model of a given shape is, measured on real tensors.

    python -m evals.bench.cache_size --tokens 32768

Fills one layer with random keys and values of the shape in one update, as a prompt does, shows it
a query (of which the layer keeps a Hessian), and reads `cache.memory()`. Every layer of a
model takes the same again; the tables are shared by all. Sizes are bytes, and bits per element of
keys and values; "smaller" is against the uncompressed tensors.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from rotorquant_hf import PRESETS, RotorQuantCache
from rotorquant_hf.quant.rotations import MAX_DIM, MIN_DIM

from .common import default_device, new_parser


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row per preset."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    presets = list(PRESETS)
    add("--tokens", type=int, default=32768, help="of the prompt")
    add("--batch", type=int, default=1, help="rows of the batch")
    add("--heads", type=int, default=8, help="key and value heads")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of tensors"
    )
    add("--device", default=default_device(), help="cuda, cuda:1, ..., or cpu")
    add("--presets", nargs="+", default=presets[:6], choices=presets, help="settings to compare")
    args = parser.parse_args(argv)
    if min(args.tokens, args.batch, args.heads, args.head_dim) < 1:
        parser.error("choose sizes from 1")
    if not MIN_DIM <= args.head_dim <= MAX_DIM:
        parser.error(f"--head-dim is {args.head_dim}; choose from {MIN_DIM} to {MAX_DIM}")
    torch.manual_seed(0)
    shape = (args.batch, args.heads, args.tokens, args.head_dim)
    keys = torch.randn(shape, dtype=getattr(torch, args.dtype), device=args.device)
    values = torch.randn_like(keys)
    print(f"One layer: {shape} keys and values in {args.dtype}, {2 * keys.nbytes:,} bytes")
    print("\n| preset | bytes | smaller | bits/element | spare | quantised tokens alone |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for preset in args.presets:
        cache = RotorQuantCache(preset)
        scaled_dot_product_attention(keys[:, :, -1:], *cache.update(keys, values, 0))
        report = cache.memory()
        print(
            f"| {preset} | {report.total_bytes:,} | {report.ratio:.2f}x | "
            f"{report.bits_per_number:.2f} | {report.parts['spare'] / report.total_bytes:.1%} | "
            f"{report.packed_ratio:.2f}x |"
        )


if __name__ == "__main__":
    main()
