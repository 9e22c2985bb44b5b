"""Decode attention on a CPU: reading packed codes beside uncompressed keys and values.

    python -m evals.bench.cpu --context 32768

One query token, one layer. Times, in turn within one run: attention that reads the packed codes
(`attend`), through the native library where that was compiled, and in plain torch; the same keys
and values dequantised and given to scaled_dot_product_attention, as any operation that is not
attention makes a cache do; and scaled_dot_product_attention on tensors that were never compressed.
Times are milliseconds a call: medians, and the middle half of the samples in brackets. The ratio is
that of scaled_dot_product_attention to packed codes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.attention.dispatch import attend
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.backend import backend, running

from ..environment import processor
from .common import in_turn, middle_half, new_parser

_DTYPES = ["float32", "bfloat16", "float16"]


def cached(
    context: int, heads: int, d: int, bits: int, dtype: torch.dtype
) -> tuple[CompressedTensor, CompressedTensor, Tensor, Tensor]:
    """Keys and values of a decode step at `context` tokens, compressed and as they were."""
    keys, values = torch.randn(2, 1, heads, context, d).to(dtype)
    cache = RotorQuantCache(key_bits=bits, value_bits=bits)
    cache.update(keys[:, :, :-1], values[:, :, :-1], 0)
    packed = cache.update(keys[:, :, -1:], values[:, :, -1:], 0)
    assert isinstance(packed[0], CompressedTensor)
    assert isinstance(packed[1], CompressedTensor)
    return packed[0], packed[1], keys, values


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row per width, dtype and number of threads."""
    args = _arguments(argv)
    torch.manual_seed(0)
    threads_before = torch.get_num_threads()
    print(
        f"{' '.join(sys.orig_argv[1:])}; torch {torch.__version__}, {processor()}, packed codes by "
        f"{running('cpu')}\n"
    )
    columns = ("packed codes", "in torch", "dequantise + sdpa", "sdpa, uncompressed", "ratio")
    print(f"| dtype | bits | threads | {' | '.join(columns)} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for dtype in args.dtype:
        query = torch.randn(1, args.heads, 1, args.head_dim).to(getattr(torch, dtype))
        options = AttentionOptions(args.head_dim**-0.5)
        for bits in args.bits:
            packed_k, packed_v, keys, values = cached(
                args.context, args.kv_heads, args.head_dim, bits, query.dtype
            )
            states = _packed(packed_k), _packed(packed_v)
            variants = {
                "packed": partial(attend, query, *states, options),
                "torch": partial(_in_torch, query, *states, options),
                "dequantised": partial(_dequantised, query, packed_k, packed_v),
                "plain": partial(sdpa, query, keys, values, enable_gqa=True),
            }
            for threads in args.threads:
                torch.set_num_threads(threads)
                times = in_turn(variants, args.repeats, query.device)
                ratio = statistics.median(times["plain"]) / statistics.median(times["packed"])
                cells = " | ".join(middle_half(times[name]) for name in variants)
                print(f"| {dtype} | {bits} | {threads} | {cells} | {ratio:.2f}x |", flush=True)
    torch.set_num_threads(threads_before)


def _packed(x: CompressedTensor) -> KVStates:
    assert x.packed_states is not None
    return x.packed_states


def _in_torch(query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions) -> Tensor:
    with backend("torch"):
        return attend(query, keys, values, options)


def _dequantised(query: Tensor, keys: CompressedTensor, values: CompressedTensor) -> Tensor:
    return sdpa(query, keys.materialize(), values.materialize(), enable_gqa=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    bits = [2, 3, 4, 8]
    add("--context", type=int, default=32768, help="tokens that the query reads")
    add("--heads", type=int, default=32, help="query heads")
    add("--kv-heads", type=int, default=8, help="key and value heads")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--bits", type=int, nargs="+", default=bits, choices=range(1, 9), help="per element")
    add("--dtype", nargs="+", default=_DTYPES[:2], choices=_DTYPES, help="of the tensors")
    add("--threads", type=int, nargs="+", default=[1, 2], help="of torch")
    add("--repeats", type=int, default=7, help="samples of each variant")
    args = parser.parse_args(argv)
    if args.context < 300 or args.repeats < 2 or min(args.threads) < 1:
        parser.error("choose a --context from 300, --repeats from 2 and --threads from 1")
    if args.heads % args.kv_heads:
        parser.error(f"--heads is {args.heads}; choose a multiple of --kv-heads {args.kv_heads}")
    return args


if __name__ == "__main__":
    main()
