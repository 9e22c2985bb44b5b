"""The caches that the harness measures, one file per family.

To add one: a subclass of `Kind` in a file of its own here, and its entry in `KINDS`.
"""

from .base import Kind
from .calibrated import CALIBRATED
from .dynamic import DYNAMIC
from .quantized import FP8, HQQ, QUANTO
from .rotorquant import HAAR, HADAMARD, ROTORQUANT

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        DYNAMIC,
        ROTORQUANT,
        CALIBRATED,
        HAAR,
        HADAMARD,
        QUANTO,
        HQQ,
        FP8,
    )
}
"""By name, the baseline first."""
