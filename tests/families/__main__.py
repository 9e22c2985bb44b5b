"""Measure all families and write their table: `python -m tests.families [FAMILY ...]`.

With names, the rows of these families are printed, with their reasons, and nothing is written.
"""

from __future__ import annotations

import os
import sys

from evals.requirements import install, missing

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if absent := missing(["pytest"]):  # which the models of all tests are built with
    print(f"error: tests.families needs pytest: {install(absent)}", file=sys.stderr)
    raise SystemExit(2)

import torch
import transformers

from tests.families.building import NotBuiltError, families
from tests.families.cells import Row, measure
from tests.families.table import FILE, text_of


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows: list[Row] = []
    not_built: dict[str, str] = {}
    for family in names or families():
        try:
            row = measure(family)
        except NotBuiltError as error:
            not_built[family] = str(error)
            print(family, "not built:", error)
            continue
        rows.append(row)
        reasons = [f"{column}: {x.reason}" for column, x in row.cells.items() if x.reason]
        print(family, *row.marks, *reasons, sep="  ", flush=True)
    if not names:
        FILE.write_text(text_of(rows, not_built), encoding="utf-8")
        print(f"written to {FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
