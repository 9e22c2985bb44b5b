"""Where a model is: the device that its token ids go to, and the part of its kv heads that is here.

Accelerate keeps weights that it offloads elsewhere between their uses, and puts placeholders on the
device "meta" in their places. With tensor parallelism (`tp_plan`) every process holds a part of the
heads of every layer, and so its caches do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The part of a model's kv heads that this process holds: of all parts of equal size, one.

    Attributes:
        index: which, from 0.
        count: how many parts there are; 1 if the model is not divided.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_model(cls, config: Any) -> Part:
        """That of a loaded model, by its config."""
        divided: Any = getattr(config, "distributed_config", None)
        count = getattr(divided, "tp_size", None) or 1
        if count == 1 or divided.tp_plan == {} or not torch.distributed.is_initialized():
            return cls()
        # Tensor parallelism is the innermost axis of Transformers' mesh of processes.
        return cls(torch.distributed.get_rank() % count, count)

    def take(self, x: Tensor) -> Tensor:
        """Its heads of a tensor (batch, heads, ...).

        All of it where there is one for all heads, as a model with fewer heads than parts has.
        """
        if x.dim() < 2 or x.shape[1] % self.count:  # what has no heads, a layer refuses
            return x
        return x.chunk(self.count, dim=1)[self.index] if self.count > 1 else x

    def __str__(self) -> str:
        if self.count == 1:
            return "all kv heads"
        return f"part {self.index + 1} of {self.count} of the kv heads"


def input_device(model: Any) -> torch.device:
    """The device that a model's token ids go to, also if its weights are offloaded."""
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # accelerate's; several in a sequence
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return model.device
