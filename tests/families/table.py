"""The table of all families, as a file in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from rotorquant_hf import __version__
from tests.families.cells import ATTENTION, BOTH, NO, NONE, TEXTS, WHOLE, YES, Row

FILE = Path(__file__).parents[2] / "evals" / "results" / "families.md"
COMMAND = "python -m tests.families"
COLUMNS = ("layers", "bits", *ATTENTION, *TEXTS)

_HEAD = """# Families of models

Made by `{command}`: rotorquant-hf {version}, transformers {transformers}, torch {torch}. Every
causal language model of Transformers, with random weights, two to four layers and heads of some 16
channels.

{counts}

- **layers**: how many of the layers that hold something are compressed, and of what kinds they
  are. "own": kept by Transformers' own layer (linear attention, convolutions, indexed sparse
  attention).
- **bits** of a packed element at k3v3, scales included: 3 + 16 / head dim (3.13 for heads of 128).
- **sdpa**, **rotorquant**, **eager**: attention by that implementation over packed tokens. {yes}
  reads the codes in every layer; {whole} has a layer's keys and values dequantised first, by the
  line of Transformers in the note ("eager" always does); {both} does both; {none} the family has no
  such attention, or nothing is compressed. Counted, not taken from a list.
- **greedy**, **beams**, **crop** (read, crop, read on), **assisted**, **padding** (on the left):
  {yes} the same tokens and logits as with `DynamicCache`, in the lossless mode, in which packed
  tokens are stored exactly; {no} others, or an error; {none} `DynamicCache` cannot do it either,
  for the reason in the note.

"""


def text_of(rows: Sequence[Row], not_built: Mapping[str, str]) -> str:
    """The file.

    Args:
        rows: of the families that were measured.
        not_built: of the others, by name, the reasons.
    """
    notes: dict[str, int] = {}
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"| --- | --- |{' :-: |' * (len(COLUMNS) - 1)}"]
    for row in rows:
        cells = []
        for column in COLUMNS:
            cell = row.cells[column]
            note = (
                f"<sup>{notes.setdefault(cell.reason, len(notes) + 1)}</sup>" if cell.reason else ""
            )
            cells.append(cell.mark + note)
        lines.append(f"| {row.family} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    lines += ["", "## Not built", "", "| family | why |", "| --- | --- |"]
    lines += [f"| {family} | {reason} |" for family, reason in sorted(not_built.items())]
    head = _HEAD.format(
        command=COMMAND,
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        counts=_counts(rows, len(not_built)),
        yes=YES,
        no=NO,
        none=NONE,
        whole=WHOLE,
        both=BOTH,
    )
    return head + "\n".join(lines) + "\n"


def _counts(rows: Sequence[Row], not_built: int) -> str:
    def having(mark: str, *columns: str) -> int:
        return sum(any(row.cells[column].mark == mark for column in columns) for row in rows)

    compressed = [row for row in rows if not row.cells["layers"].mark.startswith("0/")]
    reading = ", ".join(f"{having(YES, name)} by {name}" for name in ATTENTION[:2])
    texts = ", ".join(f"{having(YES, way)} {way}" for way in TEXTS)
    return (
        f"**{len(rows)} families**, {len(compressed)} of which are compressed. "
        f"{having(YES, *ATTENTION)} of these read codes ({reading}). "
        f"Same texts: {texts}; others than `DynamicCache`: {having(NO, *TEXTS, *ATTENTION)}. "
        f"{not_built} more are [not built](#not-built)."
    )


def version_in(text: str) -> str:
    """The version of Transformers that a file is of."""
    found = re.search(r"transformers ([^,]+),", text)
    assert found is not None
    return found[1]


def marks_in(text: str) -> dict[str, tuple[str, ...]]:
    """By family the marks of its row in a file, without the notes."""
    table, _, _ = text.partition("## Not built")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    plain = [[re.sub("<sup>.*?</sup>", "", cell) for cell in row] for row in rows]
    return {row[0]: tuple(row[1:]) for row in plain if row[0] not in ("family", "---")}


def not_built_in(text: str) -> dict[str, str]:
    """By family the reason why a file has no row of it."""
    _, _, table = text.partition("## Not built")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if row[0] not in ("family", "---")}
