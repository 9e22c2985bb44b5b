"""Scores of lm-eval's tasks as a measurement of a sweep."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..caches.registry import CacheSpec
from ..errors import InputError, NotAvailableError, require
from ..lm_eval.model_args import CHUNK
from ..lm_eval.tasks import TASKS, data_folder
from ..options import option
from ..places import called
from ..requirements import install
from ..subjects.models import LoadedModel
from .base import Measurement, one_by_one

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_BOOTSTRAP = 1000  # resamples for the standard error of metrics that have no formula


@dataclass(frozen=True)
class LmEvalOptions:
    """Which tasks of lm-eval, and how they are run."""

    tasks: tuple[str, ...] = option(
        ("rotorquant_facts", "rotorquant_rhymes", "rotorquant_recall"), "names of tasks or groups"
    )
    limit: int | None = option(None, "documents of each task (default: all)", min=1)
    num_fewshot: int | None = option(None, "examples in a prompt (default: the task's)", min=0)
    batch_size: int = option(1, "rows of a forward pass", min=1)
    chunk: int = option(
        CHUNK, "maximum tokens of a forward pass (the baseline is read in the same passes)", min=1
    )
    include_path: str | None = option(
        None, "folder with more tasks (default: this project's own, evals/tasks)"
    )
    data: str | None = option(None, "folder with the JSON files of the *_local tasks")

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install."""
        return ("lm-eval",)


def measure(
    loaded: LoadedModel, spec: CacheSpec, options: LmEvalOptions, seed: int = 1234
) -> dict[str, Any]:
    """Scores of one cache, as plain values.

    Args:
        loaded: the model.
        spec: the cache.
        options: tasks and how they are run.
        seed: of lm-eval's generators, the one that draws few-shot examples included.

    Returns:
        `scores`: of every task, its metrics, and their standard errors as `<metric>_stderr`;
        `compressed_share`: of the keys and values that scored or generated tokens read, the share
        read quantised; `compressed_shares`: the same by task; `warnings`; `tasks_versions`.

    Raises:
        NotAvailableError: if lm-eval is not installed.
        InputError: for an unknown task.
    """
    try:
        from lm_eval import simple_evaluate

        from ..lm_eval.model import RotorQuantLM
    except ImportError as error:
        raise NotAvailableError(
            f"lm-eval does not load ({error}): {install(['lm-eval'])}"
        ) from error
    lm = RotorQuantLM(
        loaded.model,
        cache=spec,
        chunk=options.chunk,
        make_cache=lambda: loaded.new_cache(spec),
        tokenizer=loaded.tokenizer,
        batch_size=options.batch_size,
    )
    with data_folder(options.data):
        found = simple_evaluate(
            lm,
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            task_manager=_manager_of(options),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        "scores": {name: _plain(row) for name, row in found["results"].items()},
        "compressed_share": lm.compressed_share,
        "compressed_shares": {name: reads.share for name, reads in lm.reads.items()},
        "warnings": list(lm.warnings),
        "tasks_versions": dict(found["versions"]),
    }


def _manager_of(options: LmEvalOptions) -> TaskManager:
    """The index of tasks that knows all that are asked for; lm-eval's own if they need it.

    Raises:
        InputError: for an unknown task.
    """
    folder = options.include_path or str(TASKS)
    require(Path(folder).is_dir(), f"include_path {folder} is not a folder")
    missing = list(options.tasks)
    for include_defaults in (False, True):  # reading lm-eval's own takes seconds
        manager = _manager(folder, include_defaults)
        missing = [task for task in options.tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    raise InputError(f"unknown task {missing[0]!r}; `{called()} lm-eval ls tasks` lists them")


@functools.lru_cache(maxsize=4)
def _manager(folder: str, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Metrics by name: lm-eval's `acc,none` is `acc`; a filter other than none stays named."""
    return {
        name.removesuffix(",none"): None if value == "N/A" else float(value)
        for name, value in row.items()
        if "," in name
    }


LM_EVAL = Measurement(
    name="lm_eval",
    text="scores of lm-eval's tasks, all requests read through the cache",
    meaning="Scores of lm-eval's tasks; a difference within the standard errors says nothing.",
    options=LmEvalOptions,
    prepare=lambda loaded, options, seed: one_by_one(
        lambda spec: measure(loaded, spec, options, seed)
    ),
)
