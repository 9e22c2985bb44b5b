"""Tilings of the attention kernel: tries them on decode steps, and compares the best.

    python -m evals.bench.tune --batch 1 --context 32768 --bits 3 --out tune.jsonl

For every batch, context, head dim and kind it times, as graphs on the device, tilings (rows and
tokens of a program, splits, warps, stages) near the default one, and then the best of them and the
default in turn. Every result is compared with that of the default. Times are microseconds a call;
"of copy" is the bandwidth of the stored bytes as a fraction of a large copy. On a CPU the kernels
run in Triton's interpreter (TRITON_INTERPRET=1): that checks this command, its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rotorquant_hf import RotorQuantConfig

from ..failures import guarded
from ..timing import Sampler, Stopwatch, Timing, Variant, interleave
from .common import exit_with, new_parser
from .decode_step import (
    BOUNDS,
    AttentionShape,
    Run,
    Step,
    WrongResult,
    add_options,
    compile_jobs,
    kinds,
    parse,
    relative_error,
    run,
    say,
    status_of,
    take_step,
)

if TYPE_CHECKING:
    from rotorquant_hf.attention.triton_attention import Tiling


def tilings(default: Tiling) -> list[Tiling]:
    """Tilings that need a compilation of their own, those nearest to the default first."""
    grid = itertools.product((32, 64, 128), (1, 2, 4, 8), (1, 2, 3))
    found = [
        dataclasses.replace(default, block_n=n, warps=warps, stages=stages)
        for n, warps, stages in grid
    ]
    found.append(dataclasses.replace(default, block_m=2 * default.block_m))
    found.append(dataclasses.replace(default, direct=not default.direct))
    if default.integers:
        found.append(dataclasses.replace(default, integers=False))
    found += [dataclasses.replace(default, registers=count) for count in (None, 96, 128, 168)]
    for registers, n in itertools.product((128, 168), (32, 64)):
        alone = dataclasses.replace(default, warps=1, pairs=1, exact_stages=1)
        found.append(dataclasses.replace(alone, block_n=n, registers=registers))
    found.append(dataclasses.replace(default, pairs=0 if default.pairs else 1))
    for exact_n, (n, warps) in itertools.product((32, 64), ((64, 2), (64, 4), (128, 4))):
        found.append(dataclasses.replace(default, exact_n=exact_n, block_n=n, warps=warps))

    def distance(tiling: Tiling) -> int:
        mine, theirs = asdict(tiling), asdict(default)
        return sum(mine[name] != theirs[name] for name in mine)

    return sorted({default, *found}, key=lambda x: (distance(x), x.warps == 1, repr(x)))


def variations(tiling: Tiling, tokens: int) -> list[Tiling]:
    """The same tiling with other counts of splits: nothing to be compiled."""
    wanted = {max(1, round(tiling.splits * x)) for x in (1 / 3, 1 / 2, 2 / 3, 4 / 3, 2, 3, 4)}
    max_splits = -(-tokens // tiling.block_n)
    splits = sorted(x for x in wanted if x <= max_splits and x != tiling.splits)
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
        tokens = self.steps[0].keys.packed.shape[2]
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


def tune(shape: AttentionShape, run: Run) -> None:
    """Try tilings on one configuration and print the best; no new kind once the time is up."""
    for name, settings in kinds(run.args).items():
        key: dict[str, Any] = {"kind": "tune", **asdict(shape), "variant": name}
        if run.out_of_time:
            run.log.write(key | {"kind": "skipped"})
        elif not run.has(key | {"final": True}):
            report = partial(_report, run, key)
            with guarded(run.stopwatch.device, partial(_report_failure, report)):
                _tune_kind(shape, settings, run, report)
                tried = [
                    x for x in run.log.entries if x.items() >= key.items() and "final" not in x
                ]
                failed = sum(row["status"] != "ok" for row in tried)
                say(f"{len(tried)} tilings tried, {failed} of them failed")


def _tune_kind(
    shape: AttentionShape,
    settings: RotorQuantConfig,
    run: Run,
    report: Callable[[dict[str, Any]], None],
) -> None:
    args, stopwatch = run.args, run.stopwatch
    generator = torch.Generator(stopwatch.device).manual_seed(0)
    step = take_step(shape, settings, generator)
    count = stopwatch.sets(step.nbytes) - 1
    steps = [step, *(take_step(shape, settings, generator) for _ in range(count))]
    tuner = Tuner(steps, stopwatch, args.repeats, args.config_seconds, report)
    for tiling, timing in tuner.run(args.limit):
        default = tiling == tuner.default
        rate = step.nbytes / timing.median / run.copy
        row = {"tiling": asdict(tiling), "default": default, "of_copy": rate}
        report({"status": "ok", "final": True, **row, **timing.row()})
        say(tune_row(run.log.entries[-1]))


def _report(run: Run, key: dict[str, Any], row: dict[str, Any]) -> None:
    run.log.write(key | row)


def _report_failure(report: Callable[[dict[str, Any]], None], reason: str) -> None:
    report({"status": status_of(reason), "reason": reason})
    say(reason)


def tune_row(row: dict[str, Any]) -> str:
    """A final row of the tuning as a line of a Markdown table under `TUNE_HEADER`."""
    cells = [str(row[name]) for name in ("batch", "context", "head_dim", "variant")]
    names = ("block_m", "block_n", "exact_n", "splits", "warps", "stages")
    cells += [str(row["tiling"][name]) for name in names]
    cells += [f"{row['us']:.1f}", f"{row['us_p10']:.1f}-{row['us_p90']:.1f}"]
    cells += [f"{row['of_copy']:.1%}", "default" if row["default"] else ""]
    return f"| {' | '.join(cells)} |"


def part_of_tilings(index: int, count: int, limit: int | None, default: Tiling) -> list[Tiling]:
    """Every `count`-th of the first tilings to be tried, from `index` on: one process's part."""
    return tilings(default)[:limit][index::count]


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, and return the exit status: 1 if a tiling's result is wrong."""
    parser = new_parser(__doc__)
    add_options(parser)
    parser.add_argument(
        "--config-seconds", type=float, default=5.0, help="to try tilings of each kind"
    )
    parser.add_argument("--limit", type=int, help="tilings of each kind to try")
    args = parse(parser, argv)
    parts = [partial(part_of_tilings, i, args.workers, args.limit) for i in range(args.workers)]
    jobs = [(*job, part) for part in parts for job in compile_jobs(args)]
    return run("tune", tune, TUNE_HEADER, jobs, args, argv)


if __name__ == "__main__":
    exit_with(main)
