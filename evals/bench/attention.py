"""Decode attention of one query token: the kernels on packed codes against SDPA on plain tensors.

    python -m evals.bench.attention --out attention.jsonl
    python -m evals.bench.attention --tune --batch 1 --context 32768 --bits 3

For every batch, context and head dim it times, in turn within one run:

- k2v2, k3v3, k4v4 (`--prod`: k3v3 with QJL keys): `attend_packed` on the states that a
  `RotorQuantLayer` of that many tokens hands out in a decode step;
- sdpa: PyTorch's attention on plain tensors through each of its backends, with `enable_gqa` (gqa)
  and with the query heads of a group as query tokens (packed); the fastest is the measure;
- cat: what `DynamicCache` adds per step, the concatenation of keys and values;
- update: what `RotorQuantLayer` adds per step (not as a graph: replays would outgrow the store).

Bytes are those of the stored keys and values that a call reads (cat, update: and writes), from the
tensors; their rate is compared with a large copy on the same device, bytes read plus written.
`--tune` tries tilings of the attention kernel instead. On a CPU the kernels run in Triton's
interpreter (TRITON_INTERPRET=1): that checks this command, the times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates, RingStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer

from ..environment import Versions, device_of, on_gpu
from ..failures import DeviceLost, free_memory, guarded
from ..tables import markdown
from ..timing import Sampler, Stopwatch, Timing, Variant, copy_bandwidth, interleave
from .common import DEVICE_LOST, RowLog, chunks, exit_with, random_states, require_kernels

if TYPE_CHECKING:
    from rotorquant_hf.attention.triton_attention import Tiling

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = ("gqa", "packed")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
"""Relative errors that are allowed, beyond the rounding of the output to its dtype."""

_CHECK_NUMBERS = 1 << 28  # of keys: 2 GiB in float64


class WrongResult(AssertionError):
    """A kernel's result is not what the reference computes."""


@dataclass(frozen=True)
class Shape:
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
    def numbers_per_token(self) -> int:
        """Numbers of the keys of one token."""
        return self.batch * self.kv_heads * self.head_dim

    @property
    def options(self) -> AttentionOptions:
        """Plain attention."""
        return AttentionOptions(scale=self.head_dim**-0.5)

    def dense_bytes(self) -> int:
        """Bytes of plain keys and values."""
        return 2 * self.context * self.numbers_per_token * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Step:
    """A decode step over packed codes, of which attention is to be computed."""

    shape: Shape
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

        return default_tiling(self.query, self.values)

    def reference(self) -> Tensor:
        """The same in float64, on the dequantised tensors."""
        keys, values = (
            CachedStates(x.sinks.double(), x.packed, x.recent.double()).materialize()
            for x in (self.keys, self.values)
        )
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


def take_step(shape: Shape, settings: RotorQuantConfig, generator: torch.Generator) -> Step:
    """Fill a layer with all tokens but one, and decode that one.

    Raises:
        ValueError: if so few tokens leave nothing to be packed.
    """
    layer = RotorQuantLayer(settings)
    with torch.no_grad():
        for count in chunks(shape.context - 1, shape.numbers_per_token):
            layer.update(*shape.states(count, generator))
        keys, values = layer.update(*shape.states(1, generator))
    if not isinstance(keys, CompressedTensor) or not isinstance(values, CompressedTensor):
        raise ValueError(f"nothing is packed of {shape.context} tokens: the exact window has all")
    if not isinstance(keys.states, RingStates) or not isinstance(values.states, RingStates):
        raise ValueError("the layer does not decode through the kernels here")
    return Step(shape, layer, shape.query(generator), keys.states, values.states)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, of all numbers together."""
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
        WrongResult: if the rest is above the bound, or not a number.
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


class Bench:
    """Makes the variants of one configuration.

    Args:
        shape: the configuration.
        stopwatch: of the device.
        check: compare the kernels with the reference, where that is not too large.
        most_bytes: that all tensors of the configuration together may take.
    """

    def __init__(self, shape: Shape, stopwatch: Stopwatch, check: bool, most_bytes: int) -> None:
        self.shape, self.stopwatch = shape, stopwatch
        self.check = check and shape.context * shape.numbers_per_token <= _CHECK_NUMBERS
        self.most_bytes, self.bytes = most_bytes, 0
        self.generator = torch.Generator(stopwatch.device).manual_seed(0)
        self._plain: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, nbytes: int) -> None:
        """Count bytes that are about to be taken.

        Raises:
            MemoryError: if they are more than allowed.
        """
        if self.bytes + nbytes > self.most_bytes:
            raise MemoryError(
                f"{nbytes:,} bytes more than the {self.bytes:,} taken are above --max-bytes "
                f"{self.most_bytes:,}"
            )
        self.bytes += nbytes

    def plain(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sets of query, keys and values as plain tensors, shared by all that read them."""
        if not self._plain:
            nbytes = self.shape.dense_bytes()
            count = self.stopwatch.sets(nbytes)
            self.take(count * nbytes)
            self._plain = [
                (
                    self.shape.query(self.generator),
                    *self.shape.states(self.shape.context, self.generator),
                )
                for _ in range(count)
            ]
        return self._plain

    def kernel(self, name: str, settings: RotorQuantConfig) -> Variant:
        """The kernels on packed codes."""
        bits = (settings.key_bits + settings.value_bits) / 2 + 1  # and scales, window, spare
        step_bytes = int(self.shape.dense_bytes() * bits / 16)
        self.take(step_bytes)
        steps = [take_step(self.shape, settings, self.generator)]
        nbytes = steps[0].nbytes
        count = self.stopwatch.sets(nbytes)
        self.take((count - 1) * step_bytes)
        steps += [take_step(self.shape, settings, self.generator) for _ in range(count - 1)]
        note = {"error": check_step(steps[0], self.stopwatch)} if self.check else {}
        return Variant(name, [step.attend for step in steps], nbytes, note=note)

    def sdpa(self, name: str, kind: SDPBackend, form: str) -> Variant:
        """PyTorch's attention on plain tensors."""
        shape, sets = self.shape, self.plain()

        def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if form == "gqa":
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            packed = query.view(shape.batch, shape.kv_heads, shape.group, shape.head_dim)
            return F.scaled_dot_product_attention(packed, keys, values)

        calls = [partial(attend, *tensors) for tensors in sets]
        return Variant(name, calls, sets[0][1].nbytes + sets[0][2].nbytes, partial(_only, kind))

    def cat(self, name: str) -> Variant:
        """The concatenation of `DynamicCache`."""
        sets, new = self.plain(), self.shape.states(1, self.generator)

        def concatenate(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat((keys, new[0]), dim=-2), torch.cat((values, new[1]), dim=-2)

        calls = [partial(concatenate, keys, values) for _, keys, values in sets]
        moved = 2 * sum(x.nbytes for x in (*sets[0][1:], *new))
        return Variant(name, calls, moved)

    def update(self, name: str, settings: RotorQuantConfig) -> Variant:
        """A step of the layer that is not attention."""
        self.take(int(self.shape.dense_bytes() * (settings.key_bits + settings.value_bits) / 32))
        layer = take_step(self.shape, settings, self.generator).layer
        new = self.shape.states(1, self.generator)
        moved = 2 * (new[0].nbytes + new[1].nbytes)
        return Variant(
            name, [torch.no_grad()(partial(layer.update, *new))], moved, capturable=False
        )


@contextmanager
def _only(kind: SDPBackend) -> Iterator[None]:
    """SDPA through one backend alone; why it refuses is in the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(kind):
                yield
        except RuntimeError as error:
            if not _refused(str(error)):
                raise
            lines = [str(entry.message).split(" (Triggered")[0] for entry in caught]
            reasons = [x for x in lines if "not used because" not in x and "disabled" not in x]
            text = f"{str(error).splitlines()[0]} {'; '.join(reasons)}"
            raise RuntimeError(text.strip()) from None


def _refused(reason: str) -> bool:
    return "No available kernel" in reason or "No viable backend" in reason


def status_of(reason: str) -> str:
    """What kind of failure a reason tells of."""
    if _refused(reason):
        return "refused"
    if "MemoryError" in reason:
        return "out of memory"
    return "wrong" if reason.startswith(WrongResult.__name__) else "failed"


def kinds(args: argparse.Namespace) -> dict[str, RotorQuantConfig]:
    """The settings to be measured, by name."""
    found = {f"k{b}v{b}": RotorQuantConfig(key_bits=b, value_bits=b) for b in args.bits}
    if args.prod:
        prod = RotorQuantConfig(key_bits=3, value_bits=3, key_quantizer="prod")
        found["k3v3 prod"] = prod
    return found


def plans(bench: Bench, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """What makes each variant, by name, in the order of the rows."""
    found: dict[str, Callable[[], Variant]] = {}
    for name, settings in kinds(args).items():
        found[name] = partial(bench.kernel, name, settings)
    first, settings = next(iter(kinds(args).items()))
    found[f"update {first}"] = partial(bench.update, f"update {first}", settings)
    for backend_name, form in itertools.product(args.sdpa, FORMS):
        name = f"sdpa {backend_name} {form}"
        found[name] = partial(bench.sdpa, name, BACKENDS[backend_name], form)
    found["cat"] = partial(bench.cat, "cat")
    return found


def measure(
    shape: Shape, args: argparse.Namespace, stopwatch: Stopwatch, copy: float, log: RowLog
) -> None:
    """Time all variants of one configuration and write a row for each mode of each."""
    key: dict[str, Any] = {"kind": "attention", **asdict(shape)}
    most = args.max_bytes
    if most is None:
        most = int(0.85 * free_memory(stopwatch.device)) if stopwatch.cuda else 1 << 33
    bench = Bench(shape, stopwatch, args.check, most)
    samplers: list[Sampler] = []

    def report(variant: str, mode: str, reason: str) -> None:
        row = {"variant": variant, "mode": mode, "status": status_of(reason), "reason": reason}
        known = row["status"] == "refused" and any(row.items() <= x.items() for x in log.rows)
        log.write(key | row)
        if not known:
            _say(table_row(log.rows[-1]))

    for name, make in plans(bench, args).items():
        if _known_to_fail(log.rows, key, name, "all"):
            continue
        with guarded(stopwatch.device, partial(report, name, "all")) as faults:
            variant = make()
            estimate, scratch = stopwatch.prepare(variant)
        if faults:
            continue
        for mode in stopwatch.modes(variant):
            if _known_to_fail(log.rows, key, name, mode):
                continue
            with guarded(stopwatch.device, partial(report, name, mode)):
                samplers.append(stopwatch.sampler(variant, mode, estimate, scratch))
    timed = interleave(
        stopwatch,
        samplers,
        args.repeats,
        args.config_seconds,
        lambda sampler, reason: report(sampler.variant.name, sampler.mode, reason),
    )
    for row in compared([_row(sampler, timing, copy) for sampler, timing in timed]):
        log.write(key | row)
        _say(table_row(log.rows[-1]))


def _known_to_fail(
    rows: Iterable[dict[str, Any]], key: dict[str, Any], name: str, mode: str
) -> bool:
    """Whether a run before this one failed here, or a capture failed, for any shape."""
    for row in rows:
        if row.get("variant") != name or row.get("mode") != mode or row["status"] == "ok":
            continue
        if row.items() >= key.items() or (mode == "graph" and row["status"] == "failed"):
            return True
    return False


def _row(sampler: Sampler, timing: Timing, copy: float) -> dict[str, Any]:
    variant = sampler.variant
    rate = variant.moved / timing.median
    return {
        "variant": variant.name,
        "mode": sampler.mode,
        "status": "ok",
        **timing.row(),
        "bytes": variant.moved,
        "gb_s": rate / 1e9,
        "of_copy": rate / copy,
        "sets": len(variant.calls),
        "calls": sampler.calls,
        **variant.note,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one configuration with the best SDPA of their mode and how it compares."""
    found = []
    for row in rows:
        sdpa = [x for x in rows if x["mode"] == row["mode"] and x["variant"].startswith("sdpa ")]
        best = min(sdpa, key=lambda x: x["us"], default=None)
        if best is not None:
            row = row | {"best_sdpa": best["variant"], "speedup": best["us"] / row["us"]}
        found.append(row)
    return found


HEADER = (
    "batch", "context", "d", "variant", "mode", "us", "p10-p90", "MB", "GB/s", "of copy",
    "best SDPA / this", "error",
)  # fmt: skip


def table_row(row: dict[str, Any]) -> str:
    """A row as a line of a Markdown table under `HEADER`."""
    cells = [str(row[name]) for name in ("batch", "context", "head_dim", "variant", "mode")]
    if row["status"] != "ok":
        cells += [f"{row['status']}: {row['reason']}".replace("|", "/"), *[""] * 6]
    else:
        cells += [
            f"{row['us']:.1f}",
            f"{row['us_p10']:.1f}-{row['us_p90']:.1f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['gb_s']:.0f}",
            f"{row['of_copy']:.1%}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
            f"{row['error']:.1e}" if "error" in row else "",
        ]
    return f"| {' | '.join(cells)} |"


def summary(rows: list[dict[str, Any]]) -> str:
    """A compact table of each mode: a line per configuration."""
    rows = [row for row in rows if row.get("kind") == "attention"]
    names = list(dict.fromkeys(row["variant"] for row in rows if _is_kernel(row["variant"])))
    tables = []
    for mode in ("graph", "eager"):
        lines = []
        for group in _by_shape(row for row in rows if row["mode"] in (mode, "all")):
            if all(row["mode"] == "all" for row in group.values()):
                continue
            first = next(iter(group.values()))
            best = min(
                (r for n, r in group.items() if n.startswith("sdpa ") and r["status"] == "ok"),
                key=lambda r: r["us"],
                default=None,
            )
            base = "none" if best is None else f"{best['us']:.1f} ({best['variant'][5:]})"
            cat = group.get("cat", {"status": "absent"})
            lines.append(
                [
                    *(str(first[name]) for name in ("head_dim", "context", "batch")),
                    base,
                    f"{cat['us']:.1f}" if cat["status"] == "ok" else cat["status"],
                    *(_brief(group.get(name, {"status": "absent"})) for name in names),
                ]
            )
        header = ("d", "context", "batch", "best SDPA, us", "cat, us", *names)
        if lines:
            text = f"{mode}: us, times faster than the best SDPA, share of the copy bandwidth"
            tables.append(f"{text}\n\n{markdown(header, lines, left=0)}")
    return "\n\n".join(tables)


def _is_kernel(variant: str) -> bool:
    return variant.startswith("k")


def _by_shape(rows: Iterable[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Rows by variant, per configuration."""
    names = [f.name for f in dataclasses.fields(Shape)]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), {})[row["variant"]] = row
    return list(groups.values())


def _brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return row["status"]
    speedup = f", {row['speedup']:.2f}x" if "speedup" in row else ""
    return f"{row['us']:.1f}{speedup}, {row['of_copy']:.0%}"


# Tuning


def tilings(default: Tiling) -> list[Tiling]:
    """Tilings that need a compilation of their own, those most like the default first."""
    grid = itertools.product((32, 64, 128), (1, 2, 4, 8), (1, 2, 3))
    found = [
        dataclasses.replace(default, block_n=n, warps=warps, stages=stages)
        for n, warps, stages in grid
    ]
    found.append(dataclasses.replace(default, block_m=2 * default.block_m))
    for exact_n, (n, warps) in itertools.product((32, 64), ((64, 2), (64, 4), (128, 4))):
        found.append(dataclasses.replace(default, exact_n=exact_n, block_n=n, warps=warps))

    def distance(tiling: Tiling) -> int:
        mine, theirs = asdict(tiling), asdict(default)
        return sum(mine[name] != theirs[name] for name in mine)

    return sorted(
        {default, *found}, key=lambda x: (distance(x), x.warps == 1, dataclasses.astuple(x))
    )


def variations(tiling: Tiling, tokens: int) -> list[Tiling]:
    """The same tiling with other numbers of splits: nothing to be compiled."""
    wanted = {max(1, round(tiling.splits * x)) for x in (1 / 3, 1 / 2, 2 / 3, 4 / 3, 2, 3, 4)}
    most = -(-tokens // tiling.block_n)
    splits = sorted(x for x in wanted if x <= most and x != tiling.splits)
    return [dataclasses.replace(tiling, splits=x) for x in splits]


class Tuner:
    """Tries tilings on one configuration and kind.

    Args:
        steps: equal steps on different memory.
        stopwatch, repeats: how to time.
        seconds: how long to try.
        report: takes a row for every tiling tried.
    """

    def __init__(
        self,
        steps: list[Step],
        stopwatch: Stopwatch,
        repeats: int,
        seconds: float,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.steps, self.stopwatch, self.repeats = steps, stopwatch, repeats
        self.begin, self.time, self.report = time.monotonic(), seconds, report
        self.default = steps[0].default_tiling()
        self.expected = steps[0].attend(self.default)
        self.seconds: dict[Tiling, float] = {}

    def run(self, limit: int | None = None) -> list[tuple[Tiling, Timing]]:
        """The best tilings and the default, timed in turn, the fastest first."""
        tokens = self.steps[0].keys.max_packed
        self.try_all(tilings(self.default)[:limit], 0.5)
        for tiling in self.best(10):
            self.try_all(variations(tiling, tokens)[:limit], 0.75)
        for tiling in self.best(2):
            others = [dataclasses.replace(tiling, exact_n=n) for n in (16, 32, 64, 128)]
            self.try_all(others[:limit], 1.0)
        chosen = list(dict.fromkeys([*self.best(6), self.default]))
        samplers, made = [], {}
        for tiling in chosen:
            with guarded(self.stopwatch.device, partial(self._failed, tiling)):
                samplers.append(self._sampler(tiling))
                made[id(samplers[-1])] = tiling
        timed = interleave(
            self.stopwatch,
            samplers,
            self.repeats,
            2.0,
            lambda sampler, reason: self._failed(made[id(sampler)], reason),
        )
        results = [(made[id(sampler)], timing) for sampler, timing in timed]
        return sorted(results, key=lambda x: x[1].median)

    def best(self, count: int) -> list[Tiling]:
        """The fastest tilings so far."""
        return sorted(self.seconds, key=self.seconds.__getitem__)[:count]

    def try_all(self, candidates: Iterable[Tiling], share: float) -> None:
        """Time new tilings briefly, until this share of the time is over."""
        until = self.begin + share * self.time
        for tiling in candidates:
            if tiling in self.seconds or time.monotonic() > until:
                continue
            with guarded(self.stopwatch.device, partial(self._failed, tiling)):
                error = relative_error(self.steps[0].attend(tiling), self.expected.double())
                if not error <= 2 * BOUNDS[self.expected.dtype]:
                    raise WrongResult(f"{error:.2e} from the default tiling's result")
                sampler = self._sampler(tiling)
                count = 5 if self.stopwatch.cuda else 1
                timing = Timing.of([self.stopwatch.sample(sampler) for _ in range(count)])
                self.seconds[tiling] = timing.median
                self.report({"tiling": asdict(tiling), "status": "ok", **timing.row()})

    def _sampler(self, tiling: Tiling) -> Sampler:
        calls = [partial(step.attend, tiling) for step in self.steps]
        variant = Variant("tiling", calls, self.steps[0].nbytes)
        mode = self.stopwatch.modes(variant)[0]
        return self.stopwatch.sampler(variant, mode, *self.stopwatch.prepare(variant))

    def _failed(self, tiling: Tiling, reason: str) -> None:
        row = {"tiling": asdict(tiling), "status": status_of(reason), "reason": reason}
        self.report(row)


TUNE_HEADER = (
    "batch", "context", "d", "kind", "block_m", "block_n", "exact_n", "splits", "warps", "stages",
    "us", "p10-p90", "of copy", "",
)  # fmt: skip


def tune(
    shape: Shape,
    args: argparse.Namespace,
    stopwatch: Stopwatch,
    copy: float,
    log: RowLog,
    until: float,
) -> None:
    """Try tilings on one configuration and print the best; no new kind after `until`."""
    for name, settings in kinds(args).items():
        if time.monotonic() > until:
            log.write({"kind": "skipped", **asdict(shape), "variant": name})
            continue
        key: dict[str, Any] = {"kind": "tune", **asdict(shape), "variant": name}
        if any(row.items() >= key.items() and row.get("final") for row in log.rows):
            continue

        def report(row: dict[str, Any], key: dict[str, Any] = key) -> None:
            log.write(key | row)

        failed = partial(_tune_failed, report)
        with guarded(stopwatch.device, failed):
            generator = torch.Generator(stopwatch.device).manual_seed(0)
            step = take_step(shape, settings, generator)
            count = stopwatch.sets(step.nbytes) - 1
            steps = [step, *(take_step(shape, settings, generator) for _ in range(count))]
            tuner = Tuner(steps, stopwatch, args.repeats, args.config_seconds, report)
            for tiling, timing in tuner.run(args.limit):
                default = tiling == tuner.default
                rate = step.nbytes / timing.median / copy
                row = {"tiling": asdict(tiling), "default": default, "of_copy": rate}
                report({"status": "ok", "final": True, **row, **timing.row()})
                _say(tune_row(log.rows[-1]))
            tried = [row for row in log.rows if row.items() >= key.items() and "final" not in row]
            ok = sum(row["status"] == "ok" for row in tried)
            _say(f"{len(tried)} tilings tried, {len(tried) - ok} of them failed")


def _tune_failed(report: Callable[[dict[str, Any]], None], reason: str) -> None:
    report({"status": status_of(reason), "reason": reason})
    _say(reason)


def tune_row(row: dict[str, Any]) -> str:
    """A final row of the tuning as a line of a Markdown table under `TUNE_HEADER`."""
    cells = [str(row[name]) for name in ("batch", "context", "head_dim", "variant")]
    names = ("block_m", "block_n", "exact_n", "splits", "warps", "stages")
    cells += [str(row["tiling"][name]) for name in names]
    cells += [f"{row['us']:.1f}", f"{row['us_p10']:.1f}-{row['us_p90']:.1f}"]
    cells += [f"{row['of_copy']:.1%}", "default" if row["default"] else ""]
    return f"| {' | '.join(cells)} |"


def compile_share(shapes: list[Shape], args: argparse.Namespace, device: torch.device) -> None:
    """Compile, and so put into Triton's cache, share i of n of what this command will launch."""
    index, count = args.share
    until = time.monotonic() + args.seconds
    generator = torch.Generator(device).manual_seed(0)
    first = {shape.head_dim: shape for shape in reversed(shapes)}
    jobs = list(itertools.product(first.values(), kinds(args).values()))
    for shape, settings in jobs if args.tune else jobs[index::count]:
        others: list[Tiling] = []
        with guarded(device, _say):
            step = take_step(shape, settings, generator)
            step.attend()
            if args.tune:
                others = tilings(step.default_tiling())[: args.limit][index::count]
        for tiling in others:
            if time.monotonic() < until:
                with guarded(device, _say):
                    step.attend(tiling)


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run, print tables, and return the exit status: 1 if a result is wrong."""
    args = _arguments(argv)
    device = device_of(args.device)
    log = RowLog(args.out, args.resume)
    shapes = [
        Shape(batch, context, args.heads, args.kv_heads, head_dim, args.dtype)
        for head_dim, context, batch in itertools.product(args.head_dim, args.context, args.batch)
    ]
    kernels: AbstractContextManager[None] = nullcontext()
    if not on_gpu(device):
        kernels = backend("triton")
    with kernels:
        if args.share:
            compile_share(shapes, args, device)
            return 0
        try:
            versions = _run(shapes, args, Stopwatch(device), log, argv)
        except DeviceLost as error:
            _say(f"The device is lost {error}; start anew with --resume")
            return DEVICE_LOST
    if not args.tune:
        _say(f"\n{summary(log.rows)}")
    _say(f"\n{versions}")
    return int(any(row.get("status") == "wrong" for row in log.rows))


def _run(
    shapes: list[Shape],
    args: argparse.Namespace,
    stopwatch: Stopwatch,
    log: RowLog,
    argv: list[str] | None,
) -> Versions:
    until = time.monotonic() + args.seconds
    copy = copy_bandwidth(stopwatch)
    versions = Versions.of(stopwatch.device, "evals.bench.attention", argv)
    log.write(versions.row() | {"copy_gb_s": copy / 1e9, "l2_bytes": stopwatch.l2_bytes})
    _say(f"copy: {copy / 1e9:.0f} GB/s, read and written\n")
    _say(markdown(TUNE_HEADER if args.tune else HEADER, [], left=5))
    left_out = []
    for shape in shapes:
        if time.monotonic() > until:
            left_out.append(shape)
        elif args.tune:
            tune(shape, args, stopwatch, copy, log, until)
        elif not _done(shape, log.rows):
            measure(shape, args, stopwatch, copy, log)
    for shape in left_out:
        _say(f"not measured, out of time (--seconds {args.seconds:g}): {shape}")
        log.write({"kind": "skipped", **asdict(shape), "reason": "out of time"})
    return versions


def _done(shape: Shape, rows: list[dict[str, Any]]) -> bool:
    key = {"kind": "attention", "status": "ok", **asdict(shape)}
    return any(row.items() >= key.items() for row in rows)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    contexts = [1024, 4096, 16384, 32768, 65536, 131072]
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=contexts, help="tokens read")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of keys and values")
    parser.add_argument("--prod", action="store_true", help="also 3-bit keys with QJL signs")
    parser.add_argument("--sdpa", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="samples of a variant")
    parser.add_argument("--config-seconds", type=float, default=5.0, help="of samples, or tuning")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after")
    parser.add_argument("--max-bytes", type=int, help="tensors of one configuration, together")
    parser.add_argument("--check", action="store_true", help="compare with float64")
    parser.add_argument("--tune", action="store_true", help="try tilings instead")
    parser.add_argument("--limit", type=int, help="tilings of each kind to try")
    parser.add_argument("--out", type=Path, help="JSON lines, appended")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has")
    parser.add_argument("--share", type=share, help="I/N: only compile share I of N")
    args = parser.parse_args(argv)
    require_kernels(parser, args.device)
    numbers = (args.kv_heads, args.heads, *args.batch, *args.context, *args.head_dim)
    if min(numbers) < 1 or not all(1 <= bits <= 8 for bits in args.bits):
        parser.error("sizes must be positive, and --bits from 1 to 8")
    if args.heads % args.kv_heads:
        parser.error(f"--heads is {args.heads}; choose a multiple of --kv-heads {args.kv_heads}")
    return args


def share(text: str) -> tuple[int, int]:
    """ "I/N" as two numbers."""
    index, count = text.split("/")
    return int(index), int(count)


if __name__ == "__main__":
    exit_with(main)
