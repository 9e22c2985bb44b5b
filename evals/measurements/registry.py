"""The measurements that commands and sweeps can make.

To add one: its file here, which defines a `Measurement`, and its entry in `MEASUREMENTS`.
"""

from __future__ import annotations

from .agreement import AGREEMENT
from .base import Measurement
from .lm_eval import LM_EVAL
from .memory import MEMORY
from .needle import NEEDLE
from .perplexity import PERPLEXITY
from .speed import SPEED

MEASUREMENTS: dict[str, Measurement] = {
    measurement.name: measurement
    for measurement in (
        PERPLEXITY,
        MEMORY,
        SPEED,
        NEEDLE,
        AGREEMENT,
        LM_EVAL,
    )
}
"""By name."""
