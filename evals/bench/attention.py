"""Decode attention of one query token: the kernels on packed codes against SDPA on plain tensors.

    python -m evals.bench.attention --out attention.jsonl

For every batch, context and head dim it times, in turn within one run:

- k2v2, k3v3, k4v4 (`--prod`: k3v3 with QJL keys): `attend_packed` on the states that a
  `RotorQuantLayer` of that many tokens hands out in a decode step;
- sdpa: PyTorch's attention on plain tensors through each of its backends, with `enable_gqa` (gqa)
  and with the query heads of a group as query tokens (packed); the fastest is the measure;
- cat: what `DynamicCache` adds per step, the concatenation of keys and values;
- update: what `RotorQuantLayer` adds per step (not as a graph: replays would outgrow the store).

Times are microseconds a call. Bandwidth counts the bytes of stored keys and values that a call
reads (cat, update: and writes), as a fraction of a large device-to-device copy. On a CPU the
kernels run in Triton's interpreter (TRITON_INTERPRET=1): that checks this command, its times mean
nothing. `evals.bench.tune` tries tilings of the attention kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rotorquant_hf import RotorQuantConfig

from ..failures import free_memory, guarded
from ..tables import markdown
from ..timing import Sampler, Stopwatch, Timing, Variant, interleave
from .common import exit_with, new_parser
from .decode_step import (
    AttentionShape,
    Run,
    add_options,
    check_step,
    compile_jobs,
    is_refusal,
    kinds,
    parse,
    run,
    say,
    status_of,
    take_step,
)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = ("gqa", "packed")

_MAX_CHECKED = 1 << 28  # elements of keys: 2 GiB in float64


class AttentionBench:
    """Makes the variants of one configuration.

    Args:
        shape: the configuration.
        stopwatch: of the device.
        check: compare the kernels with the reference, where that is not too large.
        max_bytes: that all tensors of the configuration together may take.
    """

    def __init__(
        self, shape: AttentionShape, stopwatch: Stopwatch, check: bool, max_bytes: int
    ) -> None:
        self.shape, self.stopwatch = shape, stopwatch
        self.check = check and shape.context * shape.elements_per_token <= _MAX_CHECKED
        self.max_bytes, self.bytes = max_bytes, 0
        self.generator = torch.Generator(stopwatch.device).manual_seed(0)
        self._plain: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, nbytes: int) -> None:
        """Count bytes that are about to be taken.

        Raises:
            MemoryError: if they are more than allowed.
        """
        if self.bytes + nbytes > self.max_bytes:
            raise MemoryError(
                f"{nbytes:,} bytes more than the {self.bytes:,} taken are above --max-bytes "
                f"{self.max_bytes:,}"
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
        bits = (
            settings.key_spec.bits + settings.value_spec.bits
        ) / 2 + 1  # and scales, window, spare
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
        self.take(
            int(self.shape.dense_bytes() * (settings.key_spec.bits + settings.value_spec.bits) / 32)
        )
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
            if not is_refusal(str(error)):
                raise
            lines = [str(entry.message).split(" (Triggered")[0] for entry in caught]
            reasons = [x for x in lines if "not used because" not in x and "disabled" not in x]
            text = f"{str(error).splitlines()[0]} {'; '.join(reasons)}"
            raise RuntimeError(text.strip()) from None


def plans(bench: AttentionBench, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
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


def measure(shape: AttentionShape, run: Run) -> None:
    """Time all variants of one configuration and write a row for each mode of each."""
    key: dict[str, Any] = {"kind": "attention", **asdict(shape)}
    args, stopwatch, log = run.args, run.stopwatch, run.log
    if run.has(key | {"status": "ok"}):
        return
    max_bytes = args.max_bytes
    if max_bytes is None:
        max_bytes = int(0.85 * free_memory(stopwatch.device)) if stopwatch.cuda else 1 << 33
    bench = AttentionBench(shape, stopwatch, args.check, max_bytes)
    samplers: list[Sampler] = []

    def report(variant: str, mode: str, reason: str) -> None:
        row = {"variant": variant, "mode": mode, "status": status_of(reason), "reason": reason}
        known = row["status"] == "refused" and any(row.items() <= x.items() for x in log.entries)
        log.write(key | row)
        if not known:
            say(table_row(log.entries[-1]))

    for name, make in plans(bench, args).items():
        if _known_to_fail(log.entries, key, name, "all"):
            continue
        with guarded(stopwatch.device, partial(report, name, "all")) as faults:
            variant = make()
            estimate, scratch = stopwatch.prepare(variant)
        if faults:
            continue
        for mode in stopwatch.modes(variant):
            if _known_to_fail(log.entries, key, name, mode):
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
    for row in compared([_row(sampler, timing, run.copy) for sampler, timing in timed]):
        log.write(key | row)
        say(table_row(log.entries[-1]))


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
    names = [f.name for f in dataclasses.fields(AttentionShape)]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), {})[row["variant"]] = row
    return list(groups.values())


def _brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return row["status"]
    speedup = f", {row['speedup']:.2f}x" if "speedup" in row else ""
    return f"{row['us']:.1f}{speedup}, {row['of_copy']:.0%}"


def main(argv: list[str] | None = None) -> int:
    """Run, print tables, and return the exit status: 1 if a result is wrong."""
    parser = new_parser(__doc__)
    add_options(parser)
    backends = list(BACKENDS)
    parser.add_argument("--sdpa", nargs="*", default=backends, choices=backends, help="backends")
    parser.add_argument(
        "--config-seconds", type=float, default=5.0, help="of samples of each configuration"
    )
    parser.add_argument("--max-bytes", type=int, help="of the tensors of one configuration")
    parser.add_argument("--check", action="store_true", help="compare with float64")
    parser.add_argument("--tune", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.tune:
        parser.error(f"--tune is a command of its own: python -m {__package__}.tune")
    return run("attention", measure, HEADER, compile_jobs(args), args, argv, summary)


if __name__ == "__main__":
    exit_with(main)
