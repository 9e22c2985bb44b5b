"""What coding a prompt costs: forward passes over one, with caches in turn.

    python -m evals.bench.prefill --tokens 4096 --caches k3v3 k4v4

A pass of a model over a prompt through an empty cache, in milliseconds: median, and the middle half
of the samples in brackets; and how much longer than through DynamicCache, sample by sample in turn.
Without --model the model has random weights, by default layers of the shape of Llama-3.1-8B and a
small vocabulary, for only the last token's logits are computed.

With --by-kernel, on a GPU, one more pass through each cache by torch's profiler: the device's time
in every kernel of this package, and in all others together.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import Cache, PreTrainedModel

from rotorquant_hf.passing import cache_argument

from ..caches.registry import BASELINE, CacheSpec
from ..environment import Versions, device_of, on_gpu
from ..subjects.models import DTYPES, ModelOptions, load
from .common import default_device, device_events, exit_with, in_turn, middle_half, new_parser
from .generate import build_model

KERNELS = tuple(
    f"{name}_kernel" for name in ("moment", "block", "channels", "hessian", "feedback", "append")
)
"""Of this package, that code a prompt."""


def prefill(model: PreTrainedModel, ids: torch.Tensor, spec: CacheSpec) -> Cache:
    """One pass over a prompt, through an empty cache, which it returns."""
    cache = spec.make(model.config)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache), logits_to_keep=1)
    return cache


def rows(times: dict[str, list[float]]) -> list[str]:
    """Rows of a Markdown table; the first cache is what the others are compared with."""
    baseline = next(iter(times.values()))
    lines = []
    for label, samples in times.items():
        extra = [100 * (x / y - 1) for x, y in zip(samples, baseline, strict=True)]
        compared = "" if samples is baseline else middle_half(extra, "%")
        lines.append(f"| {label} | {middle_half(samples)} | {compared} |")
    return lines


def by_kernel(events: Iterable[Any]) -> list[str]:
    """Rows of a Markdown table: launches of kernels and their time, among a profiler's events."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            name = event.name if event.name in KERNELS else "all others"
            times.setdefault(name, []).append(event.device_time)
    order = sorted(times, key=lambda name: -sum(times[name]))
    return [f"| {name} | {len(times[name])} | {sum(times[name]):.0f} |" for name in order]


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table, a row per cache."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = device_of(args.device)
    if args.model:
        options = ModelOptions(model=args.model, dtype=args.dtype, device=str(device))
        model = load(options).model
    else:
        model = build_model(args, device)
    specs = [CacheSpec.named(name, "--caches") for name in (BASELINE, *args.caches)]
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, args.tokens)
    ids = torch.randint(1, model.config.vocab_size - 1, size, generator=generator).to(device)
    print(f"{Versions.of(device, 'evals.bench.prefill', argv)}\n")
    print("| cache | ms a pass | beside DynamicCache |\n| --- | ---: | ---: |")
    passes = {spec.label: partial(prefill, model, ids, spec) for spec in specs}
    print("\n".join(rows(in_turn(passes, args.repeats, device))))
    for name, one_pass in passes.items() if args.by_kernel else ():
        print(f"\n| kernel, {name} | launches | us |\n| --- | ---: | ---: |")
        print("\n".join(by_kernel(device_events(one_pass))))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="of the prompt")
    add("--batch", type=int, default=1, help="rows of a batch")
    add("--caches", nargs="+", default=["k4v4", "k3v3"], help="names, with settings as in verify")
    add("--model", help="folder, GGUF file or Hub name; without: random weights of the shape below")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=4096)
    add("--heads", type=int, default=32, help="query heads")
    add("--kv-heads", type=int, default=8, help="key and value heads")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--intermediate", type=int, default=14336)
    add("--vocab", type=int, default=1024)
    add("--dtype", default="bfloat16", choices=DTYPES[1:], help="of the model")
    add("--device", default=default_device(), help="cuda, cuda:1, ..., or cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--repeats", type=int, default=7, help="samples of each cache")
    add("--by-kernel", action="store_true", help="also the device's time in each kernel")
    args = parser.parse_args(argv)
    if args.by_kernel and not on_gpu(device_of(args.device)):
        parser.error(f"the device is {args.device}: kernels take time on a GPU alone")
    if args.tokens < 1 or args.batch < 1 or args.repeats < 2 or args.threads < 1:
        parser.error("choose --tokens, --batch and --threads from 1, and --repeats from 2")
    return args


if __name__ == "__main__":
    exit_with(main)
