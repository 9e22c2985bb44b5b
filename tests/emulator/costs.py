"""What 64 more tokens cost the attention kernel: by its machine code, and counted while it runs.

    python -m tests.emulator.costs --head-dim 64 128 --bits 2 3 4

Instructions are those of the machine code (`evals.bench.kernel_cost`), of which a processor issues
four a cycle, and two of those of the integer pipe. Wavefronts of shared memory, of which it serves
one a cycle, and sectors of global memory are counted by the emulator, as the difference of two
lengths. A program takes the larger of issue and wavefronts at least: the ceiling is the share of
the memory's bandwidth at which codes and scales could arrive then. (Not counted: latencies, and
what `wgmma` reads of shared memory.)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
import triton

from evals.bench.decode_step import AttentionShape
from evals.bench.kernel_cost import BANDWIDTH, CLOCK, PROCESSORS, attention_cost
from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention.triton_attention import Tiling, attend_packed
from rotorquant_hf.backend import backend
from rotorquant_hf.layers import RotorQuantLayer
from tests.emulator.counts import Counts
from tests.emulator.launch import emulation

_TOKENS = 64
_GROUP = 4  # query rows of a kv head
_SHORT = 192  # packed tokens
_LONG = _SHORT + 2 * _TOKENS


@dataclass(frozen=True)
class TokenCost:
    """What 64 tokens cost a program.

    Attributes:
        instructions: of warps, in machine code. issue: cycles of a processor that these take.
        wavefronts, ideal: of shared memory, with and without bank conflicts.
        barriers: waited at. sectors: of global memory.
        stored: bytes of codes and scales.
    """

    instructions: float
    issue: float
    wavefronts: float
    ideal: float
    barriers: float
    sectors: float
    stored: int

    @property
    def cycles(self) -> float:
        """Of a processor, at least."""
        return max(self.issue, self.wavefronts)

    @property
    def ceiling(self) -> float:
        """The share of an H200's bandwidth, 1 at most."""
        return min(1.0, self.stored / self.cycles * CLOCK * PROCESSORS / BANDWIDTH)


def token_cost(d: int, bits: int, arch: int) -> TokenCost:
    """That of keys and values of `bits` and head dim `d`."""
    cost, tiling = attention_cost(d, bits, bits, rows=_GROUP, arch=arch)
    short, long = (_counts(d, bits, arch, tokens, tiling) for tokens in (_SHORT, _LONG))

    def more(name: str) -> float:
        before, after = getattr(short, name), getattr(long, name)
        if isinstance(before, int):
            return (after - before) * _TOKENS / (_LONG - _SHORT)
        return (after.total() - before.total()) * _TOKENS / (_LONG - _SHORT)

    warps = tiling.warps * _TOKENS / tiling.block_n
    return TokenCost(
        instructions=cost.loop.total() * warps,
        issue=cost.cycles * warps,
        wavefronts=more("wavefronts"),
        ideal=more("ideal"),
        barriers=more("barriers"),
        sectors=more("sectors"),
        stored=_TOKENS * (2 * d * bits // 8 + 4),
    )


def _counts(d: int, bits: int, arch: int, tokens: int, tiling: Tiling) -> Counts:
    """Of the kernel on one kv head of so many packed tokens."""
    settings = RotorQuantConfig(
        key_bits=bits, value_bits=bits, residual_length=0, num_sink_tokens=0, statistics_length=0
    )
    shape = AttentionShape(1, tokens, _GROUP, 1, d, "bfloat16")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer = RotorQuantLayer(replace(settings, query_aware=False))
        with backend("torch"):
            layer.update(*shape.states(tokens, generator))
            keys, values = layer.keys.states, layer.values.states
        with emulation(arch) as running:
            tiling = replace(tiling, splits=1)
            attend_packed(shape.query(generator), keys, values, shape.options, tiling)
    assert not running.faults, running.faults
    (found,) = [counts for name, counts in running.counts if name == "attend_kernel"]
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", type=int, default=90, help="80: A100, 90: H100 and H200")
    add("--head-dim", type=int, nargs="+", default=[64, 128, 256], help="elements of a head")
    add("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="per element of keys and values")
    args = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{args.arch}, {_GROUP} query rows, bfloat16\n")
    print(
        "| d | bits | instructions/element | issue cycles | wavefronts | of these conflicts | "
        "barriers | bytes fetched/stored | ceiling |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for d in args.head_dim:
        for bits in args.bits:
            cost = token_cost(d, bits, args.arch)
            lanes = cost.instructions * 32 / (_TOKENS * 2 * d)
            print(
                f"| {d} | {bits} | {lanes:.2f} | {cost.issue:.0f} | "
                f"{cost.wavefronts:.0f} | {cost.wavefronts - cost.ideal:.0f} | "
                f"{cost.barriers:.0f} | {cost.sectors * 32 / cost.stored:.2f} | "
                f"{cost.ceiling:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
