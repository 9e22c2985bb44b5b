"""Which preset is safe on this model? What a user runs before trusting one.

Every cache reads the same text and is compared with the uncompressed cache. Its figures count the
tokens that read mostly codes, each with an interval, and intervals are compared with limits:

- *safe*: every interval lies within its limit;
- *not safe*: one lies beyond, or a warning speaks against the cache;
- *not enough evidence*: neither; then the verdict says how much text would decide.

A cache that crashes or lacks a package has none of the three: it *failed*, or was *not measured*.
"""

from .judge import NOT_ENOUGH, NOT_SAFE, SAFE, missing, percent, reasons
from .options import OLD_FLAGS, PRESETS, SAMPLES, VerifyOptions
from .run import FAILED, NOT_MEASURED, STATUS, Verdict, looks, outcome, recommended, verdicts
from .text import conclusion, demonstration, table, too_short

__all__ = [
    "FAILED",
    "NOT_ENOUGH",
    "NOT_MEASURED",
    "NOT_SAFE",
    "OLD_FLAGS",
    "PRESETS",
    "SAFE",
    "SAMPLES",
    "STATUS",
    "Verdict",
    "VerifyOptions",
    "conclusion",
    "demonstration",
    "looks",
    "missing",
    "outcome",
    "percent",
    "reasons",
    "recommended",
    "table",
    "too_short",
    "verdicts",
]
