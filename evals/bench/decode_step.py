"""One decode step over packed codes: made, checked, and the frame of the commands that time it."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates, PlainStates, RingStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers import RotorQuantLayer

from ..environment import Versions, device_of
from ..failures import DeviceLost, guarded
from ..sweep.rows import JSONLines
from ..tables import markdown
from ..timing import Stopwatch, Variant, copy_bandwidth
from .common import (
    DEVICE_LOST,
    add_run_options,
    chunks,
    in_processes,
    kernels,
    open_log,
    random_states,
    require_kernels,
)

if TYPE_CHECKING:
    from rotorquant_hf.attention.triton_attention import Tiling

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
"""Relative errors that are allowed, beyond the rounding of the output to its dtype."""


class WrongResult(AssertionError):
    """A kernel's result is not what the reference computes."""


@dataclass(frozen=True)
class AttentionShape:
    """One configuration: a query token of every row of a batch reads `context` tokens."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def states(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random keys and values, (batch, kv heads, tokens, head dim)."""
        shape = (self.batch, self.kv_heads, tokens, self.head_dim)
        return random_states(shape, getattr(torch, self.dtype), generator)

    def query(self, generator: torch.Generator) -> Tensor:
        """A random query, (batch, heads, 1, head dim)."""
        size = (self.batch, self.heads, 1, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return torch.randn(size, dtype=dtype, device=generator.device, generator=generator)

    @property
    def elements_per_token(self) -> int:
        """Elements of the keys of one token."""
        return self.batch * self.kv_heads * self.head_dim

    @property
    def options(self) -> AttentionOptions:
        """Plain attention."""
        return AttentionOptions(scale=self.head_dim**-0.5)

    def dense_bytes(self) -> int:
        """Bytes of plain keys and values."""
        return 2 * self.context * self.elements_per_token * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Step:
    """A decode step over packed codes, of which attention is to be computed."""

    shape: AttentionShape
    layer: RotorQuantLayer
    query: Tensor
    keys: RingStates
    values: RingStates

    def attend(self, tiling: Tiling | None = None) -> Tensor:
        """Attention by the kernels, (batch, heads, 1, head dim)."""
        from rotorquant_hf.attention.triton_attention import attend_packed

        return attend_packed(self.query, self.keys, self.values, self.shape.options, tiling)

    def default_tiling(self) -> Tiling:
        """The tiling that `attend_packed` chooses."""
        from rotorquant_hf.attention.triton_attention import default_tiling

        return default_tiling(self.query, self.keys, self.values)

    def reference(self) -> Tensor:
        """The same in float64, on the dequantised tensors."""
        keys, values = in_double(self.keys), in_double(self.values)
        # Without a mask the query heads of a group may as well be query tokens.
        packed = self.query.double().view(self.shape.batch, self.shape.kv_heads, -1, keys.shape[3])
        return attention_reference(packed, keys, values, self.shape.options).view_as(self.query)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values that attention reads."""
        return sum(
            x.sinks.nbytes + x.recent.nbytes + sum(rows.nbytes for rows in x.packed.rows.values())
            for x in (self.keys, self.values)
        )


def take_step(
    shape: AttentionShape, settings: RotorQuantConfig, generator: torch.Generator
) -> Step:
    """Fill a layer with all tokens but one, and decode that one.

    Raises:
        ValueError: if so few tokens leave nothing to be packed.
    """
    layer = RotorQuantLayer(settings)
    with torch.no_grad():
        for count in chunks(shape.context - 1, shape.elements_per_token):
            layer.update(*shape.states(count, generator))
        keys, values = map(ring_states, layer.update(*shape.states(1, generator)))
    return Step(shape, layer, shape.query(generator), keys, values)


def ring_states(x: Tensor) -> RingStates:
    """What attention reads of the keys or values that an update through the kernels returned.

    Raises:
        ValueError: if nothing is packed, or the kernels did not take the update.
    """
    if not isinstance(x, CompressedTensor) or isinstance(x.states, PlainStates):
        raise ValueError(f"nothing is packed of {x.shape[2]} tokens: the recent window has all")
    if not isinstance(x.states, RingStates):
        raise ValueError("the layer does not decode through the kernels here")
    return x.states


def in_double(states: CachedStates | RingStates) -> Tensor:
    """The dequantised tensor, not rounded to its dtype."""
    return CachedStates(states.sinks.double(), states.packed, states.recent.double()).materialize()


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, over all elements together."""
    return float((result.double() - expected).norm() / expected.norm())


def require_close(result: Tensor, expected: Tensor, bound: float | None = None) -> float:
    """The relative error of a result to a float64 one.

    The rounding of the output alone is 1.7e-3 in bfloat16: it does not count. With it, errors
    that have nothing to do with each other add up as squares. (Triton's interpreter cuts off where
    a GPU rounds to bfloat16: twice that error.)

    Args:
        result, expected: of the same shape.
        bound: None for that of the result's dtype, see `BOUNDS`.

    Raises:
        WrongResult: if the rest is above the bound, or NaN.
    """
    if bound is None:
        cut_off = result.dtype == torch.bfloat16 and result.device.type == "cpu"
        bound = 4e-3 if cut_off else BOUNDS[result.dtype]
    error = relative_error(result, expected)
    rounding = relative_error(expected.to(result.dtype), expected)
    if not error**2 - rounding**2 <= bound**2:
        raise WrongResult(
            f"relative error {error:.2e}, of which rounding {rounding:.2e}; allowed {bound:.0e}"
        )
    return error


def check_step(step: Step, stopwatch: Stopwatch) -> float:
    """The largest relative error of attention, called and replayed from a CUDA graph.

    Raises:
        WrongResult: as `require_close`.
    """
    expected = step.reference()
    results = [step.attend()]
    if stopwatch.cuda:
        outputs: list[Tensor] = []
        graph = stopwatch.capture(Variant("check", [lambda: outputs.append(step.attend())], 0), 1)
        outputs[0].fill_(float("nan"))
        graph.replay()
        results += outputs
    return max(require_close(result, expected) for result in results)


def is_refusal(reason: str) -> bool:
    """Whether a backend of SDPA says that it does not take such tensors."""
    return "No available kernel" in reason or "No viable backend" in reason


def status_of(reason: str) -> str:
    """What kind of failure a reason tells of."""
    if is_refusal(reason):
        return "refused"
    if "MemoryError" in reason:
        return "out of memory"
    return "wrong" if reason.startswith(WrongResult.__name__) else "failed"


def compile_step(
    shape: AttentionShape,
    settings: RotorQuantConfig,
    device: torch.device,
    tilings: Callable[[Tiling], Iterable[Tiling]] = lambda default: [default],
) -> None:
    """Launch a step's kernels once with each tiling, which puts them into Triton's cache.

    Args:
        shape, settings, device: of the step.
        tilings: which, given the default one. What fails is left to the run that reports it.
    """
    generator = torch.Generator(device).manual_seed(0)
    with kernels(device), guarded(device, _ignore):
        step = take_step(shape, settings, generator)
        for tiling in tilings(step.default_tiling()):
            with guarded(device, _ignore):
                step.attend(tiling)


def _ignore(reason: str) -> None:
    pass


# What the commands have in common


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that times decode steps."""
    contexts = [1024, 4096, 16384, 32768, 65536, 131072]
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows of the batch")
    add("--context", type=int, nargs="+", default=contexts, help="tokens that a query reads")
    add("--head-dim", type=int, nargs="+", default=[128, 64], help="elements of a head")
    add("--heads", type=int, default=32, help="query heads")
    add("--kv-heads", type=int, default=8, help="key and value heads")
    add("--bits", type=int, nargs="+", default=[2, 3, 4], help="per element of keys and values")
    add("--prod", action="store_true", help="also 3-bit keys with QJL signs")
    add("--repeats", type=int, default=30, help="samples of each variant")
    add("--workers", type=int, default=1, help="processes that compile the kernels beforehand")
    add_run_options(parser)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; exits where they make no sense, or where no kernel can run."""
    args = parser.parse_args(argv)
    require_kernels(parser, args.device)
    sizes = (args.kv_heads, args.heads, args.workers, *args.batch, *args.context, *args.head_dim)
    if min(sizes) < 1 or not all(1 <= bits <= 8 for bits in args.bits):
        parser.error("sizes must be positive, and --bits from 1 to 8")
    if args.heads % args.kv_heads:
        parser.error(f"--heads is {args.heads}; choose a multiple of --kv-heads {args.kv_heads}")
    return args


def shapes_of(args: argparse.Namespace) -> list[AttentionShape]:
    """The configurations to be measured."""
    return [
        AttentionShape(batch, context, args.heads, args.kv_heads, head_dim, args.dtype)
        for head_dim, context, batch in itertools.product(args.head_dim, args.context, args.batch)
    ]


def kinds(args: argparse.Namespace) -> dict[str, RotorQuantConfig]:
    """The settings to be measured, by name."""
    found = {f"k{b}v{b}": RotorQuantConfig(key_bits=b, value_bits=b) for b in args.bits}
    if args.prod:
        prod = RotorQuantConfig(key_bits=3, value_bits=3, key_quantizer="prod")
        found["k3v3 prod"] = prod
    return found


def compile_jobs(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Arguments of `compile_step`: what is compiled depends on head dim and settings alone."""
    first = {shape.head_dim: shape for shape in reversed(shapes_of(args))}
    device = device_of(args.device)
    return [(*job, device) for job in itertools.product(first.values(), kinds(args).values())]


@dataclass(frozen=True)
class Run:
    """A command at work: how it times, and where its rows go.

    Attributes:
        args: the command's. stopwatch: of its device. log: takes the rows.
        copy: bytes per second of a large copy, read and written.
        until: `time.monotonic` after which nothing new is started.
    """

    args: argparse.Namespace
    stopwatch: Stopwatch
    log: JSONLines
    copy: float
    until: float

    def has(self, row: dict[str, Any]) -> bool:
        """Whether there is a row with these values and others: the run resumes one that had it."""
        return any(found.items() >= row.items() for found in self.log.entries)

    @property
    def out_of_time(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def measure(
        self, shapes: list[AttentionShape], one: Callable[[AttentionShape, Run], None]
    ) -> None:
        """Measure one configuration after the other, while there is time."""
        for shape in shapes:
            if not self.out_of_time:
                one(shape, self)
                continue
            say(f"not measured, out of time (--seconds {self.args.seconds:g}): {shape}")
            self.log.write({"kind": "skipped", **asdict(shape), "reason": "out of time"})


def run(
    name: str,
    one: Callable[[AttentionShape, Run], None],
    header: Sequence[str],
    jobs: Sequence[tuple[Any, ...]],
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    summary: Callable[[list[dict[str, Any]]], str] | None = None,
) -> int:
    """Measure all configurations, and print their rows under one header and the versions.

    Args:
        name: the command's, in this package.
        one: measures one configuration.
        jobs: arguments of `compile_step`, for --workers; they may take a third of --seconds.
        args, argv: of the command line, parsed and as they are.
        summary: of all rows, printed after them.

    Returns:
        The exit status: 1 if a result is wrong, or `DEVICE_LOST`.
    """
    until = time.monotonic() + args.seconds
    device = device_of(args.device)
    versions = Versions.of(device, f"{__package__}.{name}", argv)
    log = open_log(args.out, args.resume)
    try:
        if args.workers > 1:
            say(f"compiling in {args.workers} processes")
            in_processes(compile_step, jobs, args.workers, args.seconds / 3)
        with kernels(device):
            stopwatch = Stopwatch(device)
            copy = copy_bandwidth(stopwatch)
            log.write(versions.row() | {"copy_gb_s": copy / 1e9, "l2_bytes": stopwatch.l2_bytes})
            say(f"copy: {copy / 1e9:.0f} GB/s, read and written\n")
            say(markdown(header, [], left=5))
            Run(args, stopwatch, log, copy, until).measure(shapes_of(args), one)
        status = int(any(row.get("status") == "wrong" for row in log.entries))
    except DeviceLost as error:
        say(f"The device is lost {error}; start anew with --resume")
        status = DEVICE_LOST
    finally:
        log.close()
    if summary is not None:
        say(f"\n{summary(log.entries)}")
    say(f"\n{versions}")
    return status


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
