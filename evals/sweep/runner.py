"""Sweeps: every row of a plan measured, and written at once.

A sweep that was stopped goes on where it stopped when the same command is given again. Under
`accelerate launch` (or `torchrun`) the rows are spread over the processes; each writes a file of
its own into the folder, and `read_results` puts them together.
"""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..environment import Versions
from ..errors import NotAvailableError, require
from ..failures import Failure, failure_of
from ..measurements.base import Run
from ..measurements.registry import MEASUREMENTS
from ..places import called
from ..processes import Share
from ..progress import say, task
from ..requirements import packages_of, require_packages
from ..subjects.models import LoadedModel, ModelOptions, load, pick_device
from .plan import Job, Plan, Row, digest
from .rows import ResultsFile, check_same, read_results


def file_of(share: Share) -> str:
    """The results file of a process."""
    return "rows.jsonl" if share.processes == 1 else f"rows-{share.rank}.jsonl"


def run(
    plan: Plan,
    out: Path,
    argv: Sequence[str] | None = None,
    retry: bool = False,
    share: Share | None = None,
) -> dict[str, int]:
    """Measure the rows of a plan that have not been measured yet.

    Args:
        plan: what to measure.
        out: folder of the results.
        argv: the command line after `called()`, for the rows (default: this process's).
        retry: measure again what failed or was not run.
        share: which rows are this process's.

    Returns:
        How many rows of each status this process has in the end.

    Raises:
        InputError: if the folder holds another sweep, or one of other versions; or if processes
            would time each other.
    """
    share = share or Share.of_environment()
    device = pick_device(None)
    timed = sum(MEASUREMENTS[row.measure].together for row in plan.rows)
    require(
        not timed or share.processes == 1 or device.type != "cpu",
        f"{timed} rows of this sweep are timed, and {share.processes} processes on one CPU would "
        "slow each other down: start it once, without the launcher, or leave speed out",
    )
    if device.type != "cpu" and share.processes > 1:
        device = torch.device(device.type, share.local_rank)
    versions = versions_of(device, argv)
    check_out(plan, out, versions)
    header = {
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "versions": versions,
        "config": plan.config,
    }
    file = ResultsFile(out / file_of(share), header)
    try:
        again = () if not retry else ("failed", "not run")
        known = {id: s for id, s in statuses(plan, out).items() if s not in again}
        jobs = [job for i, job in enumerate(plan.jobs) if share.takes(i)]
        return _Runner(file, plan.fingerprint, versions, device, share).measure(jobs, known)
    finally:
        file.close()


def statuses(plan: Plan, out: Path) -> dict[str, str]:
    """Of every row of a plan that is in a folder: its status, by its id."""
    if not any(out.glob("rows*.jsonl")):
        return {}
    _, rows = read_results([out])
    sweep = plan.fingerprint
    return {row["id"]: row["status"] for row in rows if row["sweep"] == sweep}


class _Runner:
    """Measures jobs one after the other; the model and what caches share stay until they change."""

    def __init__(
        self,
        file: ResultsFile,
        sweep: str,
        versions: dict[str, Any],
        device: torch.device,
        share: Share,
    ) -> None:
        self.file, self.sweep, self.versions = file, sweep, versions
        self.device, self.share = device, share
        self.loaded: tuple[ModelOptions, LoadedModel] | None = None
        self.prepared: tuple[str, Run | Failure] | None = None

    def measure(self, jobs: list[Job], known: dict[str, str]) -> dict[str, int]:
        # What is measured side by side is measured again together: rows of two runs cannot be
        # compared.
        todo = [job for job in jobs if not known.keys() >= {row.id for row in job.rows}]
        again = {row.id for job in todo for row in job.rows}
        statuses = [known[row.id] for job in jobs for row in job.rows if row.id not in again]
        total, done = sum(len(job.rows) for job in todo), 0
        with task("sweep", shown=self.share.rank == 0) as shown:
            for job in todo:
                rows = len(job.rows)
                text = f"row {done + 1} of {total}, {job.rows[0].measure}"
                shown.at(done / total, text, rows / total)
                statuses += self._job(job)
                done += rows
        return dict(Counter(statuses))

    def _job(self, job: Job) -> list[str]:
        """Measure the rows of a job and write them; their statuses.

        Raises:
            NotAvailableError: if the device is broken.
        """
        begin = time.perf_counter()
        results = self._results(job)
        seconds = (time.perf_counter() - begin) / len(job.rows)
        for row, result in zip(job.rows, results, strict=True):
            self.file.append(self._row(row, result, seconds))
            if isinstance(result, Failure):
                what = f"{row.measure} of {row.cache.label} on {row.model.label}"
                say(f"{what}: {result.status}: {result.reason}")
        failures = [result for result in results if isinstance(result, Failure)]
        if any(failure.fatal for failure in failures):
            raise NotAvailableError(
                f"the device does not answer any more ({failures[0].reason}): the same command "
                "goes on from here"
            )
        return [result.status if isinstance(result, Failure) else "ok" for result in results]

    def _results(self, job: Job) -> Sequence[dict[str, Any] | Failure]:
        first = job.rows[0]
        key = digest(first.to_dict() | {"cache": None})
        if self.prepared is None or self.prepared[0] != key:
            self.prepared = None  # the memory of the last one goes before the next comes
            self.prepared = (key, self._prepare(first))
        run = self.prepared[1]
        if isinstance(run, Failure):
            return [run] * len(job.rows)
        try:
            return run([row.cache for row in job.rows])
        except Exception as error:
            return [failure_of(error)] * len(job.rows)

    def _prepare(self, row: Row) -> Run | Failure:
        try:
            require_packages(row.measure, packages_of(row.model, row.options))
            if self.loaded is None or self.loaded[0] != row.model:
                self.loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # device_map="auto" plans by the memory that is free
                options = row.model
                if options.device is None:
                    options = replace(options, device=str(self.device))
                self.loaded = (row.model, load(options))
            return MEASUREMENTS[row.measure].prepare(self.loaded[1], row.options, row.seed)
        except Exception as error:
            return failure_of(error)

    def _row(self, row: Row, result: dict[str, Any] | Failure, seconds: float) -> dict[str, Any]:
        failure = result if isinstance(result, Failure) else None
        described = row.to_dict()
        if self.loaded is not None:
            described["model"] = self.loaded[1].to_dict() | {"label": row.model.label}
        return {
            "id": row.id,
            "sweep": self.sweep,
            "status": failure.status if failure else "ok",
            **described,
            "result": None if failure else result,
            "error": failure.reason if failure else None,
            "seconds": round(seconds, 3),
            "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": self.versions,
            "command": self.versions["command"],
        }


def check_out(plan: Plan, out: Path, versions: dict[str, Any]) -> None:
    """Refuse a folder that holds another sweep, or rows of other software.

    Raises:
        InputError: if it does.
    """
    header = {"fingerprint": plan.fingerprint, "versions": versions}
    for path in sorted(out.glob("rows*.jsonl")):
        for head in read_results([path])[0]:
            check_same(path, head, header)


def versions_of(device: torch.device, argv: Sequence[str] | None) -> dict[str, Any]:
    """What rows are made with, by name."""
    packages = {}
    for name in ("accelerate", "datasets", "gguf", "hqq", "lm-eval", "optimum-quanto"):
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    versions = Versions.of(device, "evals", argv).row()
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    return versions | {"packages": packages, "command": f"{called()} {words}".rstrip()}
