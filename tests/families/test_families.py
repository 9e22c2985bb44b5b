"""The table of families in the repository is what is measured now."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import transformers

from tests.conftest import ROOT
from tests.families import cells, table
from tests.families.building import NotBuiltError, families
from tests.families.cells import measure

TEXT = table.FILE.read_text(encoding="utf-8")
MARKS, NOT_BUILT = table.marks_in(TEXT), table.not_built_in(TEXT)
IS_OF_THIS_VERSION = table.version_in(TEXT) == transformers.__version__
AGAIN = f"run `{table.COMMAND}`"


@pytest.mark.parametrize("family", sorted(MARKS | NOT_BUILT))
def test_a_row_is_what_is_measured(family: str) -> None:
    if family not in families():
        assert not IS_OF_THIS_VERSION, f"{family} is none of Transformers' families: {AGAIN}"
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family in NOT_BUILT:
        with pytest.raises(NotBuiltError, match=re.escape(NOT_BUILT[family])):
            measure(family)
        return
    try:
        row = measure(family)
    except Exception as error:
        if IS_OF_THIS_VERSION:
            raise
        pytest.skip(f"not built with transformers {transformers.__version__}: {error}")
    if row.marks != MARKS.get(family) and not IS_OF_THIS_VERSION:
        # Which attention a family has, and how it keeps its states, is Transformers' affair; what
        # a cache of this package does wrong is not.
        wrong = [name for name, cell in row.cells.items() if cell.mark == cells.NO]
        assert not wrong, row
        pytest.skip(f"the table is of transformers {table.version_in(TEXT)}")
    assert row.marks == MARKS.get(family), (row, AGAIN)


def test_no_family_is_missing() -> None:
    if not IS_OF_THIS_VERSION:
        pytest.skip(f"the table is of transformers {table.version_in(TEXT)}")
    assert sorted(MARKS | NOT_BUILT) == sorted(families()), AGAIN


def test_what_the_table_promises() -> None:
    """Nothing goes wrong in any family, and most are compressed and read as codes."""
    assert not any(cells.NO in marks for marks in MARKS.values())
    assert len(MARKS) >= 150
    by = dict.fromkeys(table.COLUMNS, 0)
    for marks in MARKS.values():
        for name, mark in zip(table.COLUMNS, marks, strict=True):
            by[name] += mark == cells.YES
    assert by["sdpa"] >= 100
    assert by["rotorquant"] >= by["sdpa"]


def test_a_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows differ if codes are not read, if beams do not move, and if less is compressed."""
    name = "rotorquant_hf.attention.tensor.why_unsupported"
    with monkeypatch.context() as patch:
        patch.setattr(name, lambda *_: "never")
        assert measure("llama").cells["sdpa"].mark == cells.WHOLE
    with monkeypatch.context() as patch:
        patch.setattr("rotorquant_hf.layers.full.RotorQuantLayer.reorder_cache", lambda *_: None)
        assert measure("llama").cells["beams"].mark == cells.NO
    with monkeypatch.context() as patch:
        patch.setattr("rotorquant_hf.cache._SLIDING", ())
        assert measure("gemma3_text").cells["layers"].mark.startswith("1/3")
    assert measure("llama").marks == MARKS["llama"]


def test_the_file_is_read_as_it_is_written() -> None:
    row = measure("falcon")
    text = table.text_of([row], {"none": "no reason"})
    assert table.marks_in(text) == {"falcon": row.marks}
    assert table.not_built_in(text) == {"none": "no reason"}
    assert table.version_in(text) == transformers.__version__
    reasons = [cell.reason for cell in row.cells.values() if cell.reason]
    assert reasons
    assert all(f". {reason}\n" in text for reason in reasons)


def test_without_pytest_the_command_says_so_in_one_line() -> None:
    code = "import runpy, sys; sys.modules['pytest'] = None; sys.argv[1:] = ['llama']\n"
    code += "runpy.run_module('tests.families', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: tests.families needs pytest: pip install -e '.[dev]'\n"
