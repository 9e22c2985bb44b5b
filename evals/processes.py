"""The processes of one command, as `accelerate launch`, `torchrun` or `mpirun` starts them.

A sweep and lm-eval share their work among them. Of every other command each process would do all of
it: such a command refuses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from .errors import require

# As launchers tell it: torchrun and accelerate, Intel's MPI, Open MPI, MVAPICH.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MV2_COMM_WORLD_LOCAL_RANK",
)
_WAIT = timedelta(days=30)  # for the slowest: a sweep may take days


@dataclass(frozen=True)
class Share:
    """This process among those that share the work.

    Attributes:
        rank: which, from 0.
        processes: how many there are.
        local_rank: which of those on this machine.
    """

    rank: int = 0
    processes: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """As the launcher tells it; alone without one."""
        return cls(_number(_RANK, 0), _number(_PROCESSES, 1), _number(_LOCAL_RANK, 0))

    def takes(self, index: int) -> bool:
        """Whether a job, by its place among all, is this process's."""
        return index % self.processes == self.rank

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in their order; each waits for the slowest.

        Of processes that were not told where to meet (by `mpirun` alone), its own.
        """
        if self.processes == 1 or "MASTER_ADDR" not in os.environ:
            return [value]
        found = [None] * self.processes
        torch.distributed.init_process_group(
            "gloo", rank=self.rank, world_size=self.processes, timeout=_WAIT
        )
        try:
            torch.distributed.all_gather_object(found, value)
        finally:
            torch.distributed.destroy_process_group()
        return found


def require_one(command: str) -> None:
    """Refuse to be one of several processes.

    Raises:
        InputError: naming how many there are.
    """
    count = Share.of_environment().processes
    require(
        count == 1,
        f"{command} is run by {count} processes (accelerate launch, torchrun, mpirun), each of "
        "which would do all of it: start it once, without the launcher",
    )


def on_cpus() -> None:
    """Let accelerate see several processes where there is no accelerator: it looks for one."""
    if Share.of_environment().processes > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _number(names: tuple[str, ...], default: int) -> int:
    """The first of these variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
