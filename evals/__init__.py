"""The evaluation harness: quality, memory and speed of caches, so that one can believe them.

`rotorquant --help` (in a clone: `python -m evals --help`) lists the commands.
"""

import os

# The profiler, which counts the CPU's memory, otherwise writes two lines at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
