"""Texts in windows: as many tokens as asked for, none twice, none silently lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.errors import InputError
from evals.subjects.texts import Document, TextOptions, TooShortError, beginning, cut, encode
from tests.conftest import ROOT


class Words:
    """A tokenizer of words; `bos` is what it sets before a text."""

    def __init__(self, bos: list[int] | None = None) -> None:
        self.bos = bos or []

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [int(word) if word.isdigit() else 1 for word in text.split()]
        return SimpleNamespace(input_ids=(self.bos if add_special_tokens else []) + ids)


def numbered(*lengths: int) -> list[Document]:
    """Documents whose tokens are their places, 1000 apart."""
    return [
        Document(f"d{i}", " ".join(str(1000 * i + k) for k in range(n)))
        for i, n in enumerate(lengths)
    ]


def windows(documents, context=None, least=1, bos=None, **options):
    return cut(Words(bos), documents, TextOptions(text=("x",), **options), context, least)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    window=st.integers(2, 200),
    most=st.integers(2, 1500),
    place=st.sampled_from(["start", "spread"]),
    bos=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_windows_do_not_overlap_and_keep_to_the_budget(lengths, window, most, place, bos) -> None:
    begin = [999_999] if bos else []
    try:
        found, left_out = windows(
            numbered(*lengths), window=window, max_tokens=most, place=place, bos=begin
        )
    except InputError:
        assert max(lengths) <= 1 or min(window, most) - len(begin) <= 1
        return
    seen = [token for w in found for token in w.ids[0, len(begin) :].tolist()]
    assert len(set(seen)) == len(seen)
    assert all(w.ids.shape[1] <= min(window, most) for w in found)
    assert sum(w.ids.shape[1] for w in found) <= most or len(found) == 1
    assert left_out == sum(n <= 1 for n in lengths)
    for w in found:
        assert w.ids[0, : len(begin)].tolist() == begin
        own = w.ids[0, len(begin) :]
        assert torch.equal(own, torch.arange(len(own)) + own[0])  # a stretch as it stands
        assert own[0] == 1000 * int(w.name[1:]) + w.start


def test_every_document_gives_a_window_before_one_gives_its_second() -> None:
    found, _ = windows(numbered(100, 100, 100), window=20, max_tokens=100)
    assert [(w.name, w.start) for w in found] == [
        *(("d0", 0), ("d0", 20), ("d1", 0), ("d1", 20), ("d2", 0)),
    ]


def test_spread_reaches_from_the_first_token_to_the_last() -> None:
    found, _ = windows(numbered(100), window=20, max_tokens=60, place="spread")
    assert [w.start for w in found] == [0, 40, 80]


def test_the_models_context_bounds_a_window() -> None:
    found, _ = windows(numbered(100), window=50, context=30, max_tokens=60)
    assert [w.ids.shape[1] for w in found] == [30, 30]


def test_short_documents_are_taken_whole_or_counted_as_left_out() -> None:
    found, left_out = windows(numbered(30, 5, 12), window=20, max_tokens=100, least=8)
    assert [(w.name, w.ids.shape[1]) for w in found] == [("d0", 20), ("d2", 12)]
    assert left_out == 1


def test_a_text_shorter_than_a_chunk_is_refused() -> None:
    for lengths, options, says in (
        ((5,), {}, "the text has 5 tokens; give at least 65"),
        ((10, 64), {}, "the longest of 2 texts has 64 tokens; give at least 65"),
        ((90,), {"max_tokens": 10}, "--max-tokens is 10; set it to at least 65"),
        ((90,), {"window": 64}, "--window is 64; set it to at least 65"),
        ((90,), {"window": 65, "bos": [7]}, "--window is 65; set it to at least 66"),
    ):
        with pytest.raises(TooShortError) as refused:
            windows(numbered(*lengths), least=64, **options)
        assert str(refused.value) == says
    with pytest.raises(InputError, match="the model takes 30 tokens, and 65 are needed: choose"):
        windows(numbered(90), least=64, context=30)


def test_the_beginning_is_what_the_tokenizer_sets(tokenizer) -> None:
    assert beginning(tokenizer) == []
    assert beginning(Words([7, 8])) == [7, 8]
    assert encode(Words([7]), "1 2").tolist() == [1, 2]


def test_rows_of_a_data_set_are_one_text(monkeypatch) -> None:
    class Rows(dict):
        column_names = ("text",)

    rows = SimpleNamespace(load_dataset=lambda *names, split: Rows(text=["one", "", "two"]))
    monkeypatch.setitem(sys.modules, "datasets", rows)
    (document,) = TextOptions(dataset="wikitext").documents()
    assert document == Document("wikitext test", "one\n\ntwo")


def test_a_data_set_that_is_not_to_be_had_is_named(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"--dataset no/such-data \(configuration None, split"):
        TextOptions(dataset="no/such-data").documents()


def test_files_and_folders() -> None:
    folder = ROOT / "examples" / "sampled"
    documents = TextOptions(text=(str(folder), str(ROOT / "README.md"))).documents()
    names = [document.name for document in documents]
    assert names == ["clock.txt", "harbour.txt", "letter.txt", "road.txt", "README.md"]
