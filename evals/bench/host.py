"""What a decode step costs the host: Python and Triton's launches, with no work on the device.

    python -m evals.bench.host

On a GPU a step of a small batch waits for the host. This command measures the host's part on any
machine: the kernels are compiled for a GPU and launched as there, but nothing receives the launch.
One layer takes in a token and attends, in Transformers' attention, and beside it in turn one of a
`DynamicCache`, whose tensors are small enough for a CPU to compute in no time. Microseconds a layer
and step: median, and the middle half of the samples in brackets; Python calls are counted by the
profiler. (Not counted: the driver's own launch, some microseconds each, as in DynamicCache's.)

A second table has what a layer does besides when a prompt of 512 tokens is first packed, once a
text: statistics, query directions, codes. Its few operations of torch are computed, so the figure
is more than the host's part.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.backend import backend
from rotorquant_hf.quant.wide import needs_wide

from .common import exit_with, middle_half, new_parser, require_triton

_PROMPT = 512
_DENSE_TOKENS = 8  # of the DynamicCache: few, so that the CPU's computing does not count


class _NoLaunch:
    """Takes launches of a compiled kernel and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _NoDevice:
    """Triton's driver, and what loads its kernels, for a GPU that is not there."""

    launcher_cls = _NoLaunch

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target, self.utils = GPUTarget("cuda", arch, 32), self

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills, threads at most."""
        return 0, 0, 32, 0, 1024

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def _no_check(*_: Any, **__: Any) -> None:
    pass


def _not_wide(shift: Tensor, score_scale: float) -> bool:
    """`needs_wide` of numbers that no kernel has written."""
    needs_wide(shift, score_scale)
    return False


@contextmanager
def without_device(arch: int = 90) -> Iterator[None]:
    """Launch Triton's kernels into the void, and look for NaN as rarely as on a GPU."""
    from triton.runtime import driver

    from rotorquant_hf.kernels.launch import launch_of

    before = driver._active
    driver.set_active(_NoDevice(arch))
    launch_of.cache_clear()  # kernels that another driver launches
    unwritten = mock.patch("rotorquant_hf.store.statistics.needs_wide", _not_wide)
    unchecked = mock.patch("rotorquant_hf.layers.full.check_finite", _no_check)
    try:
        with backend("triton"), unwritten, unchecked:
            yield
    finally:
        driver._active = before
        launch_of.cache_clear()


def one_step(
    cache: Cache, layers: int, states: tuple[Tensor, Tensor, Tensor], attention: str
) -> None:
    """A decode step of all layers: queries, keys and values (batch, heads, 1, d) are the same."""
    query, keys, values = states
    module = _Attention(query.shape[1] // keys.shape[1])
    attend = ALL_ATTENTION_FUNCTIONS[attention]
    for index in range(layers):
        attend(module, query, *cache.update(keys, values, index), None, scaling=0.1)


class _Attention(nn.Module):
    """What an attention function asks of the layer that calls it."""

    is_causal = True

    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


def filled(settings: RotorQuantConfig, layers: int, keys: Tensor) -> RotorQuantCache:
    """A cache that decodes through the kernels, of keys and values like (batch, heads, 1, d)."""
    cache = RotorQuantCache(settings)
    tokens = settings.statistics_length + settings.residual_length + 2 * settings.block_length
    prompt = torch.randn(*keys.shape[:2], tokens, keys.shape[3]).to(keys.dtype)
    with backend("torch"):
        for index in range(layers):
            cache.update(prompt, prompt, index)
    return cache


def pack_prompt(settings: RotorQuantConfig, config: LlamaConfig, states: list[Tensor]) -> None:
    """Take in a prompt through a new cache, in all layers, and pack it.

    Args:
        states: queries, keys and values (batch, heads, n, d), the same in all layers.
    """
    cache = RotorQuantCache(settings, config=config)
    for layer in range(config.num_hidden_layers):
        keys, _ = cache.update(states[1], states[2], layer)
        if isinstance(keys, CompressedTensor) and keys.on_query is not None:
            keys.on_query(states[0], None, None)


def calls(step: Callable[[], None], layers: int, steps: int) -> float:
    """Function calls a layer and step, Python's and built in, in the mean of so many steps."""
    profile = cProfile.Profile()
    for _ in range(steps):
        profile.runcall(step)
    return pstats.Stats(profile).total_calls / layers / steps  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table."""
    args = _arguments(argv)
    import triton

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = (1, args.heads, 1, args.head_dim), (1, args.kv_heads, 1, args.head_dim)
    query, keys = (torch.randn(x).bfloat16() for x in shape)
    states = (query, keys, keys)
    settings = RotorQuantConfig(key_bits=3, value_bits=3, query_aware=False)
    steps: dict[str, Callable[[], None]] = {}
    with torch.no_grad(), without_device():
        for attention in ("sdpa", "rotorquant"):
            cache = filled(settings, args.layers, keys)
            steps[attention] = partial(one_step, cache, args.layers, states, attention)
        dense = DynamicCache()
        for index in range(args.layers):
            some = keys.expand(-1, -1, _DENSE_TOKENS, -1)
            dense.update(some, some, index)
        steps["DynamicCache, sdpa"] = partial(one_step, dense, args.layers, states, "sdpa")
        for step in steps.values():  # compiles
            for _ in range(2 * settings.block_length):
                step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.samples):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - began) / args.layers * 1e6)
            dense.crop(_DENSE_TOKENS - dense.get_seq_length())
        block = settings.block_length  # steps, in one of which a block is coded
        counted = {name: calls(step, args.layers, block) for name, step in steps.items()}
        shapes = (args.heads, args.kv_heads, args.kv_heads)
        prompt = [torch.randn(1, h, _PROMPT, args.head_dim).bfloat16() for h in shapes]
        config = LlamaConfig(
            hidden_size=args.heads * args.head_dim,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            num_hidden_layers=args.layers,
        )
        packing: dict[str, list[float]] = {}
        for _ in range(max(2, args.samples // 4) + 1):
            for aware in (True, False):
                settings = replace(settings, query_aware=aware)
                began = time.perf_counter()
                pack_prompt(settings, config, prompt)
                spent = (time.perf_counter() - began) / args.layers * 1e6
                packing.setdefault("k3v3" if aware else "nearest rounding", []).append(spent)
    print(f"torch {torch.__version__}, triton {triton.__version__}, {args.layers} layers\n")
    print(
        "| step | us a layer | beside DynamicCache | calls a layer |\n| --- | ---: | ---: | ---: |"
    )
    plain = times["DynamicCache, sdpa"]
    for name, samples in times.items():
        ratios = [x / y for x, y in zip(samples, plain, strict=True)]
        compared = "" if samples is plain else middle_half(ratios, "x")
        print(f"| {name} | {middle_half(samples)} | {compared} | {counted[name]:.0f} |")
    print("\n| first packing of a prompt | us a layer |\n| --- | ---: |")
    for name, samples in packing.items():
        print(f"| {name} | {middle_half(samples[1:])} |")  # the first compiles


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=16)
    add("--heads", type=int, default=4, help="query heads")
    add("--kv-heads", type=int, default=1, help="key and value heads")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--samples", type=int, default=200, help="steps timed of each")
    args = parser.parse_args(argv)
    require_triton(parser)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: run this without it")
    if args.layers < 1 or args.samples < 2:
        parser.error("choose --layers from 1 and --samples from 2")
    if args.heads % args.kv_heads:
        parser.error(f"--heads is {args.heads}; choose a multiple of --kv-heads {args.kv_heads}")
    return args


if __name__ == "__main__":
    exit_with(main)
