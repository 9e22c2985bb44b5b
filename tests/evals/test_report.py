"""Reports show what was measured, all of it, and nothing that a label smuggles in."""

from __future__ import annotations

import copy
import csv
import io
import math
import re
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import verify
from evals.errors import NotAvailableError
from evals.measurements import registry
from evals.report import Section, build, plots, write
from evals.report.blocks import Table, Text
from evals.report.frames import frame, to_csv
from evals.report.plots import front
from evals.report.text import significant, size
from evals.report.verdict import judge

VERSIONS = {"device": "x86_64 CPU, 2 threads", "torch": "2.11.0", "transformers": "5.17.0"}
HOSTILE = "k3 <script>alert(\"1\")</script>, 'a' & | `b` $x$ *c*"


def row(measurement, result, label="k3v3", kind="rotorquant", status="ok", **more):
    return {
        "kind": "row",
        "schema": 1,
        "id": f"{measurement}-{label}",
        "sweep": "ab12",
        "status": status,
        "model": {"model": "examples/books-7m", "label": "books-7m", "dtype": "float32"},
        "cache": {"kind": kind, "label": label, "options": {"name": label}},
        "measurement": measurement,
        "options": {"text": ["road.txt"]},
        "seed": 0,
        "result": result,
        "error": None,
        "seconds": 1.25,
        "finished": "2026-11-22T15:00:00Z",
        "versions": VERSIONS,
        "command": "python -m evals sweep configs/quick.yaml",
        **more,
    }


def perplexity(label, bits, kl, delta=0.5, interval=(0.25, 0.75), kind="rotorquant", **more):
    result = {
        "perplexity": 30 + delta,
        "baseline_perplexity": 30.0,
        "delta": delta,
        "delta_ci95": list(interval) if interval else None,
        "kl_mean": kl,
        "kl_p99": 10 * kl if kl is not None else None,
        "top1_agreement": 0.98765,
        "bits_per_number": bits,
        "bits_per_number_16bit": bits,
        "packed_bits_per_number_16bit": None if bits is None else bits - 0.5,
        "compressed_share": 0.8,
        "tokens": 4096,
        "windows": 8,
        "reference": "dynamic",
        "chunk": 64,
        "window": 512,
        "interval_over": "windows",
        "documents": ["road.txt"],
        "warnings": more.pop("warnings", []),
    }
    return row("perplexity", with_intervals(result), label, kind, **more)


def with_intervals(result):
    """The intervals that the figures would have with half a percent of error."""
    for name in ("kl_mean", "kl_p99", "top1_agreement"):
        x = result[name]
        known = isinstance(x, float) and result["delta_ci95"] is not None
        result[f"{name}_ci95"] = [0.995 * x, 1.005 * x] if known else None
    return result


def memory(label, bytes_of, kind="rotorquant"):
    points = [
        {"batch": 1, "context": n, "cache_bytes": x, "parts": {"codes": x}, "bits_per_number": 3.5}
        for n, x in bytes_of.items()
    ]
    return row("memory", {"points": points, "warnings": []}, label, kind)


def needle(label="k3v3"):
    points = [
        {"length": n, "depth": d, "asked": 8, "passed": 7, "chosen": 8, "quantised": n > 512}
        for n in (512, 1024)
        for d in (0.0, 0.5)
    ]
    result = {"accuracy": 0.875, "choice_accuracy": 1.0, "asked": 32, "points": points}
    return row("needle", result, label)


FAILED = row(
    "perplexity", None, "fp8", status="failed", error="OutOfMemoryError: tried to allocate 2 GiB"
)
NOT_RUN = row("speed", None, "hqq 4 bits", status="not run", error="NotAvailableError: no hqq")
HEADER = {
    "kind": "sweep",
    "schema": 1,
    "name": "frontier",
    "fingerprint": "ab12cd34",
    "versions": VERSIONS,
    "config": {"chunk": 64},
}


def report(rows, tmp_path, headers=(HEADER,), title="A title"):
    """The texts of the three files."""
    paths = write(rows, list(headers), tmp_path / "out", title)
    assert [path.name for path in paths] == ["report.html", "report.md", "rows.csv"]
    return [path.read_bytes().decode() for path in paths]


def parsed(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


class Tables(HTMLParser):
    """The cells of all tables of a page, by row, and the tags that were opened."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.cell = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None


def test_front_of_known_points() -> None:
    points = [(3.0, 0.5), (2.0, 1.0), (4.0, 0.5), (5.0, 0.1), (2.0, 2.0), (3.0, 0.5)]
    assert front(points) == [1, 0, 5, 3]
    assert front([]) == []


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8))))
def test_front_is_what_nothing_dominates(points) -> None:
    def dominated(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    found = front(points)
    assert sorted(found) == [i for i, p in enumerate(points) if not dominated(p)]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40))
def test_labels_cover_neither_points_nor_each_other(points) -> None:
    table = pd.DataFrame(points, columns=["x", "y"])
    table["number"], table["cache"] = range(len(table)), "a rather long name, of several words"
    table["front"] = table.index.isin(front(points))
    with plots._drawing("x", "y") as axes:
        axes.scatter(table["x"], table["y"])
        kept = plots.annotate(axes, table)
        dots = axes.transData.transform(table[["x", "y"]])
        boxes = [text.get_window_extent() for text in kept]
    for i, box in enumerate(boxes):
        assert box.count_contains(dots) == 0
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert 0 <= box.x0 < box.x1 <= axes.figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= axes.figure.bbox.y1


def test_every_label_is_in_every_file(tmp_path) -> None:
    rows = [perplexity(f"config {i:02d}", 2 + i / 10, 0.1 / (i + 1)) for i in range(40)]
    rows += [memory("mem", {512: 1000}), needle("hay"), FAILED, NOT_RUN]
    for text in report(rows, tmp_path):
        for each in rows:
            assert each["cache"]["label"] in text
            assert each["model"]["label"] in text


def test_what_was_not_measured_is_shown_with_its_reason(tmp_path) -> None:
    page, markdown, flat = report([FAILED, NOT_RUN], tmp_path)
    cells = Tables(page).rows
    for each in (FAILED, NOT_RUN):
        expected = [each["status"], "books-7m", each["cache"]["label"], each["measurement"]]
        assert [*expected, each["error"]] in cells
        assert f"| {' | '.join(expected)} | {each['error']} |" in markdown
    assert [(r["status"], r["error"]) for r in parsed(flat)] == [
        (each["status"], each["error"]) for each in (FAILED, NOT_RUN)
    ]
    assert ["rows", "2: 0 ok, 1 failed, 1 not run"] in cells
    assert "<svg" not in page


def test_sections_without_data_are_left_out(tmp_path) -> None:
    def titles(*rows):
        first, *found, origin, caches, last = (x.title for x in build.sections(rows, []))
        assert first == "At a glance"
        assert (origin, caches, last) == ("What was measured", "Options of the caches", "All rows")
        return found

    assert titles(perplexity("k3v3", 3.2, 0.01)) == ["Quality against bits"]
    assert titles(needle(), NOT_RUN) == ["Not measured: 1 row", "Needles"]
    assert titles(memory("k3v3", {})) == []


def quality_row(page, cache):
    """The cells of a cache in the table of quality, by head."""
    lines = Tables(page).rows
    head = next(line for line in lines if line[:2] == ["#", "cache"])
    return dict(zip(head, next(x for x in lines if x[1:2] == [cache] and len(x) > 9), strict=True))


def test_quality_table_marks_the_front(tmp_path) -> None:
    rows = [
        perplexity("better", 3.0, 0.004, 0.1, (-0.05, 0.25)),
        perplexity("dominated", 3.5, 0.02),
        perplexity("fewer bits", 2.5, 0.05),
        perplexity("dynamic", 32.0, 1e-13, 0.0, None, kind="dynamic"),
        perplexity("unread", 2.0, 0.001, warnings=["the stored codes are not read"]),
    ]
    page, markdown, _ = report(rows, tmp_path)
    names = ["better", "dominated", "fewer bits", "dynamic", "unread ⚠"]
    found = {name: quality_row(page, name) for name in names}
    assert {name for name in names if found[name]["front"] == "●"} == {"better", "fewer bits"}
    better = found["better"]
    assert (better["bits (16-bit model)"], better["bits, long texts"]) == ("3.00", "2.50")
    assert (better["KL mean"], better["KL p99"], better["top-1"]) == (
        "0.00400", "0.0400", "98.77%",
    )  # fmt: skip
    assert better["perplexity"] == "30.100"
    assert (better["change"], better["95% interval"]) == ("+0.33%", "−0.17% to +0.83%")
    assert (better["tokens"], better["windows"]) == ("4,096", "8")
    assert found["dynamic"]["#"] == "–"
    assert (
        "| 3 | **better** | **safe** | **●** | 3.00 | 2.50 | 0.00400 | 0.0400 | 98.77% |"
        in markdown
    )
    warned = "the stored codes are not read"
    assert ["books-7m", "unread", "perplexity", warned] in Tables(page).rows


def bold(page, markdown):
    """What is bold in tables, the same in both files."""
    rows = re.findall(r'<tr class="good">(.*?)</tr>', page)
    found = {x for line in rows for x in re.findall(r'<td class="text">(.+?)</td>', line)}
    assert found == set(re.findall(r"\| \*\*(.*?)\*\*", markdown))
    return found


def test_only_what_is_safe_is_bold(tmp_path) -> None:
    """A preset that takes perplexity from 50 to 56 is on the front, and not in bold."""
    rows = [perplexity("good", 5.0, 0.001, 0.0, (-0.1, 0.1)), perplexity("bad", 2.0, 0.2, 6.0)]
    rows[1]["result"] |= {"baseline_perplexity": 50.0, "perplexity": 56.0}
    page, markdown, _ = report(rows, tmp_path)
    assert quality_row(page, "bad")["front"] == "●"
    assert bold(page, markdown) == {"good", "safe", "●"}
    text = next(line[2] for line in Tables(page).rows if line[:2] == ["bad", "not safe"])
    said = "2.00 bits instead of 16: 8.0× smaller in a 16-bit model; perplexity 50.00 → 56.00 (+12"
    assert said in text
    assert "Mean KL 0.2 is over" in text
    assert "1 of 2 caches shown to be safe; the smallest of them: good." in page
    said = "Each figure rests on 4,096 predicted tokens, in 8 windows of at most 512 tokens, of "
    for file in (page, markdown):
        assert f"{said}1 text (road.txt)." in file


def figures(**more):
    found = perplexity("k3v3", 3.0, 0.001, 0.0, (-0.1, 0.1))["result"]
    return with_intervals(found | {"top1_agreement": 0.99, "compressed_share": 0.9} | more)


@pytest.mark.parametrize(
    ("more", "word", "why"),
    [
        ({}, "safe", ""),
        ({"kl_mean": 0.1}, "not safe", "mean KL 0.1"),
        ({"top1_agreement": 0.5}, "not safe", "top-1"),
        ({"delta": 3.0, "delta_ci95": [2.0, 4.0]}, "not safe", "perplexity rises by 10.00%"),
        ({"delta": 3.0, "delta_ci95": None}, "not enough evidence", "one window"),
        ({"delta_ci95": [-3.0, 3.0]}, "not enough evidence", "perplexity could rise by 10.00%"),
        ({"delta_ci95": None}, "not enough evidence", "one window"),
        ({"delta_ci95": [math.nan, None]}, "not enough evidence", "one window"),
        ({"compressed_share": 0.01}, "not enough evidence", "1% of what was read"),
        ({"warnings": ["nothing read"], "kl_mean": 0.1}, "not safe", "nothing read"),
        ({"kl_mean": None}, "no verdict", "missing"),
        ({"kl_mean": "0.1"}, "no verdict", "missing"),
        ({"baseline_perplexity": 0.0}, "no verdict", "missing"),
    ],
)
def test_verdicts(more, word, why) -> None:
    found = judge(figures(**more))
    assert found.word == word
    assert why in found.why


def test_verdicts_are_those_of_verify() -> None:
    options = verify.VerifyOptions()
    for kl in (0.0, 0.004, 0.0051, 0.1):
        for high in (0.1, 0.29, 0.31):
            for readers in (False, True):
                found = figures(kl_mean=kl, kl_p99=kl, delta_ci95=[-0.1, high])
                if readers:
                    found = figures() | {"code_readers": found}
                asked = verify.Verdict(
                    "k3v3", found, verify.reasons(found, options), verify.missing(found, options)
                )
                assert judge(found).word == asked.outcome


def test_rows_that_were_recorded_without_intervals_are_not_called_safe() -> None:
    old = {name: x for name, x in figures().items() if name == "delta_ci95" or "ci95" not in name}
    assert judge(old).word == "not enough evidence"
    assert judge(old).why == "KL and top-1 were recorded without intervals: measure again"
    assert judge(old | {"kl_mean": 0.1}).word == "not safe"


def test_bits_and_figures_of_long_texts(tmp_path) -> None:
    """Codes and scales alone; of older rows what is near. A column where there is something."""
    new, old = perplexity("new", 4.34, 0.001), perplexity("old", 4.4, 0.002)
    page = report([old], tmp_path)[0]
    assert quality_row(page, "old")["bits, long texts"] == "3.90"
    assert "KL, code readers" not in quality_row(page, "old")
    new["result"] |= {"long_bits_per_number_16bit": 4.25, "code_readers": {"kl_mean": 0.003}}
    page = report([new, old], tmp_path)[0]
    assert quality_row(page, "new")["bits, long texts"] == "4.25"
    assert quality_row(page, "new")["KL, code readers"] == "0.00300"
    assert quality_row(page, "old")["KL, code readers"] == "–"


def test_the_first_section_has_what_other_measurements_say(tmp_path) -> None:
    rows = [
        perplexity("k3v3", 3.0, 0.001, 0.0, (-0.1, 0.1)),
        memory("dynamic", {512: 4096, 1024: 8192}, "dynamic"),
        memory("k3v3", {512: 2048, 1024: 2048}),
        needle("k3v3"),
        needle("other"),
    ]
    page, _, _ = report(rows, tmp_path)
    text = next(line[2] for line in Tables(page).rows if line[:2] == ["k3v3", "safe"])
    said = (
        "4.00× fewer bytes in the float32 model measured, at 1k tokens; finds 87.5% of 32 needles."
    )
    assert said in text
    assert ["other", "no verdict", "Finds 87.5% of 32 needles."] in Tables(page).rows
    assert "Perplexity was not measured with these caches" in page


def test_figures_that_a_warning_speaks_against_are_marked(tmp_path) -> None:
    rows = [needle("sound"), needle("doubtful"), memory("dynamic", {512: 4096}, "dynamic")]
    rows[1]["result"]["warnings"] = ["only 3 of 32 facts were stored quantised"]
    rows.append(memory("doubtful", {512: 1024}))
    page, markdown, _ = report(rows, tmp_path)
    cells = Tables(page).rows
    assert ["sound", "no verdict", "Finds 87.5% of 32 needles."] in cells
    smaller = "4.00× fewer bytes in the float32 model measured, at 512 tokens"
    said = f"{smaller}; finds 87.5% of 32 needles (⚠ see Warnings)."
    assert ["doubtful", "no verdict", said] in cells
    assert said in markdown


def test_where_no_figures_can_be_judged_it_says_which_are_lacking(tmp_path) -> None:
    tasks = row("lm_eval", {"scores": {"arc": {"acc": 0.5}}, "compressed_share": 0.5})
    for text in report([tasks], tmp_path)[:2]:
        said = re.search("No perplexity or KL.*?cannot be judged.", unescape(text))
        assert said
        assert "There are no figures" not in text
    assert "limits cannot be judged" not in report([tasks, perplexity("a", 2, 0.1)], tmp_path)[1]


def test_the_limits_are_those_of_verify(tmp_path, monkeypatch) -> None:
    for text in report([perplexity("a", 2, 0.1)], tmp_path)[:2]:
        assert (
            "Limits: mean KL ≤ 0.005 nats; KL p99 ≤ 0.05; same top token ≥ 98%; perplexity rise ≤ "
            "1%; ≥ 30% of reads from codes." in text
        )
    strict = verify.VerifyOptions(max_kl=0.001, min_top1=0.995, max_delta=0.002)
    monkeypatch.setattr("evals.report.verdict.VerifyOptions", lambda: strict)
    said = report([perplexity("a", 2, 0.1)], tmp_path)[1]
    assert "mean KL ≤ 0.001 nats; KL p99 ≤ 0.05; same top token ≥ 99.5%; perplexity rise" in said


def test_markdown_says_how_to_make_what_is_not_beside_it(tmp_path) -> None:
    said = "`python -m evals report FOLDER` makes report.html (plots) and rows.csv (every figure)."
    assert said in report([needle()], tmp_path)[1].splitlines()


def ticks(page) -> list[str]:
    """The texts of all plots."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", page)


def test_plots_of_bits_are_named_for_what_they_show(tmp_path) -> None:
    page = report([perplexity("a", 2.0, 0.1), perplexity("b", 4.0, 0.001)], tmp_path)[0]
    assert re.findall("<figcaption>(KL.*?)</figcaption>", page) == [
        "KL divergence against all bits",
        "KL divergence against bits on long texts",
    ]
    found = ticks(page)
    assert found.count("bits per element on long texts: codes and scales alone") == 1
    assert found.count("mean KL divergence of all tokens (nats)") == 2


@pytest.mark.parametrize(
    ("divergence", "shown"),
    [((1e-3, 1e-6), {"1e−4", "1e−5"}), ((0.1, 0.0002), {"0.001", "0.01"})],
)
def test_ticks_of_an_axis_have_one_format(tmp_path, divergence, shown) -> None:
    rows = [perplexity(f"c{i}", 2.0 + i, x, delta=0.0) for i, x in enumerate(divergence)]
    page = report(rows, tmp_path)[0]
    figure = page[page.index("<svg") : page.index("</svg>")]
    side = figure[figure.index("ytick_1") :]
    found = {text for text in ticks(side) if re.fullmatch(r"[\d.e−]+", text)} - {"1", "2"}
    assert shown <= found
    assert len({"e" in text for text in found}) == 1


def test_the_baseline_does_not_squeeze_the_axes(tmp_path) -> None:
    """Its divergence of 1e-13 and its 32 bits are no point: the ticks stay about the others."""
    rows = [perplexity("a", 2.0, 0.1), perplexity("b", 4.0, 0.001)]
    alone = report(rows, tmp_path)[0]
    page = report([*rows, perplexity("dynamic", 32.0, 1e-13, 0, kind="dynamic")], tmp_path)[0]

    assert ticks(page) == ticks(alone)
    assert "0.01" in ticks(page)
    assert "1.0e−13 nats" in page


def test_points_are_where_the_figures_are(tmp_path) -> None:
    """On a logarithmic axis, equal ratios of divergence are equal distances."""
    rows = [perplexity(str(i), 2.0 + i, 10.0 ** -(i + 1)) for i in range(3)]
    page = report(rows, tmp_path)[0]
    figure = page[page.index("<svg") : page.index("</svg>")]
    dots = figure[figure.index("PathCollection") :]
    place = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', dots)[:3]
    assert len(place) == 3
    for axis in (0, 1):
        first, second, third = (float(at[axis]) for at in place)
        assert second - first == pytest.approx(third - second, abs=1e-3)
        assert second > first  # SVG's y grows downwards, and the divergence falls


def test_models_and_settings_have_panels_of_their_own(tmp_path) -> None:
    rows = [perplexity("k3v3", 3.0, 0.01), perplexity("k2v2", 2.0, 0.1)]
    twin = [copy.deepcopy(r) for r in rows]
    for r in twin:
        r["model"]["label"] = "books-7m, outliers 10"
    decoding = copy.deepcopy(rows[0])
    rows = [r | {"options": {"chunk": 64}} for r in (*rows, *twin)]
    rows.append(decoding | {"options": {"chunk": 1}})
    page = report(rows, tmp_path)[0]
    assert (
        re.findall(r"<h3>(.*?)</h3>", page)
        == [
            "books-7m: chunk 64",
            "books-7m, outliers 10: chunk 64",
            "books-7m: chunk 1",
        ]
        * 2
    )  # verdicts and figures
    assert page.count('class="plot"') == 9


def test_names_tell_apart_what_differs() -> None:
    rows = [row("a", {}, label) for label in ("same", "same", "other")]
    rows[0]["cache"]["options"] = {"bits": 3, "window": 128}
    rows[1]["cache"]["options"] = {"bits": 3, "window": 64}
    rows.append(copy.deepcopy(rows[2]) | {"seed": 1})
    assert list(frame(rows)["cache"]) == [
        "same (window 128)",
        "same (window 64)",
        "other, seed 0",
        "other, seed 1",
    ]


def test_devices_are_kept_apart_and_named(tmp_path) -> None:
    rows = [memory("k3v3", {512: 1000}), memory("k3v3", {512: 1000})]
    rows[1] = rows[1] | {"versions": VERSIONS | {"device": "NVIDIA H200"}}
    page, markdown, _ = report(rows, tmp_path)
    assert "These rows come from 2 devices" in page
    assert "These rows come from 2 devices" in markdown
    assert "<h3>books-7m (on NVIDIA H200), batch 1</h3>" in page


def test_memory_is_compared_with_the_uncompressed_cache(tmp_path) -> None:
    rows = [memory("dynamic", {512: 4096, 1024: 8192}, "dynamic"), memory("k3v3", {1024: 2048})]
    page, markdown, _ = report(rows, tmp_path)
    assert ["k3v3", "1,024", "3.50", "2.00 KiB", "4.00×", "–", "–"] in Tables(page).rows
    assert "| k3v3 | 1,024 | 3.50 | 2.00 KiB | 4.00× | – | – |" in markdown
    assert "bits (float32)" in page  # of a 16-bit model only where the rows have it
    for each in rows:
        for point in each["result"]["points"]:
            point["bits_per_number_16bit"] = 3.25
    page, _, _ = report(rows, tmp_path)
    assert ["k3v3", "1,024", "3.25", "2.00 KiB", "4.00×", "–", "–"] in Tables(page).rows
    assert "bits (16-bit model)" in page


def test_parts_of_a_cache_are_named_in_words(tmp_path) -> None:
    packed = memory("k3v3", {1024: 2048})
    packed["result"]["points"][0]["parts"] = {"key_codes": 2000, "exact": 48}
    assert ["cache", "context", "key codes", "uncompressed"] in Tables(
        report([packed], tmp_path)[0]
    ).rows


def test_batches_have_panels_of_their_own(tmp_path) -> None:
    rows = [memory("both", {512: 1000}), memory("one", {512: 3000})]
    rows[0]["result"]["points"].append({"batch": 4, "context": 512, "cache_bytes": 4000})
    page = report(rows, tmp_path)[0]
    small, large = page[page.index("<h3>books-7m, batch 1") :].split("<h3>books-7m, batch 4")
    large = large[: large.index("</section>")]
    assert all(name in small for name in ("both", "one"))
    assert "both" in large
    assert "one<" not in large


def test_lines_that_hide_each_other_are_named(tmp_path) -> None:
    sizes = (("a", 1000), ("b", 1001), ("c", 5000))
    rows = [memory(x, {512: n, 1024: 2 * n}) for x, n in sizes]
    assert ">a and b overlap.<" in report(rows, tmp_path)[0]
    rows += [memory("d", {512: 1002, 1024: 2004}), memory("e", {512: 5001, 1024: 10001})]
    assert ">a, b and d overlap. c and e overlap.<" in report(rows, tmp_path)[0]


def test_speed_shows_median_spread_and_ratio(tmp_path) -> None:
    def speed(label, rate, kind):
        point = {"batch": 1, "context": 512, "decode_tokens_per_s": rate, "samples": 5}
        point |= {"new_tokens": 32}
        point |= {"decode_p10": 0.5 * rate, "decode_p90": 2 * rate}
        return row("speed", {"points": [point], "warnings": []}, label, kind)

    page, _, _ = report(
        [speed("dynamic", 200, "dynamic"), speed("k3v3", 300, "rotorquant")], tmp_path
    )
    line = ["k3v3", "512", "–", "–", "–", "300", "150 to 600", "1.50×", "32", "5"]
    assert line in Tables(page).rows
    assert page.count('class="plot"') == 1  # no prefill was measured


def test_needles_by_depth_and_length(tmp_path) -> None:
    page, markdown, flat = report([needle()], tmp_path)
    cells = Tables(page)
    assert ["depth", "512", "1k"] in cells.rows
    assert ["50%", "7/8*", "7/8"] in cells.rows
    assert sum(attrs.get("style") == "--heat:88%" for _, attrs in cells.tags) == 4
    assert "| 50% | 7/8\\* | 7/8 |" in markdown
    assert [r["point.passed"] for r in parsed(flat)] == ["7"] * 4


def test_agreement_scores_and_measurements_unknown_here(tmp_path) -> None:
    lengths = {"mean_length": 20.5, "median_length": 19, "identical": 1, "prompts": 2}
    scores = {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.02}, "hella": {"acc": 0.5}}
    rows = [
        row("agreement", {**lengths, "new_tokens": 32, "lengths": [9, 32]}),
        row("lm_eval", {"scores": scores, "compressed_share": 0.5}),
        row("new thing", {"figure": 1.5, "name": "x", "list": [1, 2], "nothing": None}),
    ]
    page, _, flat = report(rows, tmp_path)
    cells = Tables(page).rows
    assert ["k3v3", "20.5", "19.0", "1", "2", "–", "32"] in cells
    assert ["cache", "read quantised", "arc acc,none", "hella acc"] in cells
    assert ["k3v3", "50.0%", "0.250 ± 0.020", "0.500"] in cells
    assert ["cache", "figure", "name", "list", "nothing"] in cells
    assert ["k3v3", "1.500", "x", "1 2", "–"] in cells
    records = parsed(flat)
    assert [r["point.length"] for r in records[:2]] == ["9", "32"]
    assert [r["point.task"] for r in records[2:4]] == ["arc", "hella"]


def test_hostile_texts_are_shown_as_they_are(tmp_path) -> None:
    rows = [
        perplexity(HOSTILE, 3.0, 0.01, warnings=[HOSTILE]),
        memory(HOSTILE, {512: 1000}),
        row("what <i>is</i>", {HOSTILE: 1, "nan": math.nan}, "x" * 300),
        row("speed", None, "a\nb", status="failed", error=HOSTILE + "\nline, two \ud800"),
        {"kind": "row", "status": "ok", "result": {"points": "none"}, "measurement": "memory"},
        {"kind": "row"},
    ]
    page, markdown, flat = report(rows, tmp_path, [{"name": HOSTILE, "config": HOSTILE}], HOSTILE)
    assert page.count("<script>") == 1
    assert "alert" not in page[page.index("<script>") :]
    assert {tag for tag, _ in Tables(page).tags if tag in ("i", "b")} == set()
    shown = [cell for line in Tables(page).rows for cell in line]
    assert HOSTILE in shown
    assert f"<h1>{HOSTILE}</h1>" == unescape(re.search("<h1>.*?</h1>", page)[0])
    assert build._escaped(HOSTILE) in markdown
    assert "<script" not in re.sub(r"```.*?```", "", markdown, flags=re.S)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    records = parsed(flat)
    assert records[0]["cache"] == HOSTILE
    assert records[3]["cache"] == "a\nb"
    assert records[3]["error"] == HOSTILE + "\nline, two ?"


def test_figures_that_are_no_numbers_draw_nothing(tmp_path) -> None:
    odd = [None, math.nan, math.inf, "0.1", True]
    rows = [perplexity(f"kl {x}", 3.0, 0.01) for x in odd]
    for r, x in zip(rows, odd, strict=True):
        r["result"] |= {"kl_mean": x, "delta": x, "delta_ci95": [x, x]}
    page = report(rows, tmp_path)[0]
    assert "<svg" not in page
    rows = [perplexity("zero", 3.0, 0.0, delta=math.nan), perplexity("one", 4.0, 0.1, math.nan)]
    page = report(rows, tmp_path)[0]
    assert page.count('class="plot"') == 2
    assert "Divergence of 0 or less, not drawn: zero." in page


ONLY = [perplexity("only", 3.0, 0.01), perplexity("dynamic", 16.0, 0.0, 0, kind="dynamic"), {}]


@pytest.mark.parametrize("rows", [[], *([each] for each in ONLY)])
def test_few_rows(rows, tmp_path) -> None:
    page, _, flat = report(rows, tmp_path, [])
    assert page.startswith("<!DOCTYPE html>")
    assert len(parsed(flat)) == len(rows)


@pytest.mark.parametrize("name", ["matplotlib", "pandas", "jinja2", "adjustText"])
def test_without_a_package_it_says_so_and_writes_nothing(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    said = rf"report needs {name.lower()}, which is not installed: pip install -e '\.\[eval\]'"
    with pytest.raises(NotAvailableError, match=said) as caught:
        report([needle()], tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_line_does_without_the_packages() -> None:
    code = "import sys; from evals.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += "print(sorted({'matplotlib', 'adjustText'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_same_rows_give_the_same_bytes(tmp_path) -> None:
    rows = [perplexity(f"c{i}", 2 + i / 3, 0.1 / (i + 1)) for i in range(9)]
    rows += [memory("dynamic", {512: 9000, 1024: 18000}, "dynamic"), needle(), FAILED]
    first = report(copy.deepcopy(rows), tmp_path / "a")
    assert report(rows, tmp_path / "b") == first


def test_the_page_needs_nothing_else(tmp_path) -> None:
    rows = [perplexity("a", 2.0, 0.1), memory("k3v3", {512: 1000, 1024: 2000}), needle()]
    page = report(rows, tmp_path)[0]
    tags = Tables(page).tags
    links = [attrs[k] for _, attrs in tags for k in ("src", "href", "xlink:href") if k in attrs]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    # Text takes the page's colour, and what is drawn reads on light and on dark.
    drawn = "".join(re.findall(r"<svg class=\"plot\".*?</svg>", page, re.S))
    assert "fill: currentColor" in drawn
    for color in set(re.findall(r"#([0-9a-f]{6})\b", drawn.replace('href="#', ""))):
        light = sum(int(color[i : i + 2], 16) for i in (0, 2, 4)) / 3 / 255
        assert 0.3 < light < 0.7, color


def test_csv_has_the_numbers_as_they_are() -> None:
    rows = [perplexity('a, "b"', 3.25, 1 / 3), memory("m", {512: 1000, 1024: 2001}), FAILED]
    first, second, third, last = parsed(to_csv(rows))
    assert first["cache"] == 'a, "b"'
    assert float(first["result.kl_mean"]) == 1 / 3
    assert float(first["result.delta_ci95_low"]) == 0.25
    assert float(first["result.delta_ci95_high"]) == 0.75
    assert first["option.text"] == '["road.txt"]'
    assert [(r["point.context"], r["point.cache_bytes"]) for r in (second, third)] == [
        ("512", "1000"),
        ("1024", "2001"),
    ]
    assert second["id"] == third["id"] == "memory-m"
    assert (last["status"], last["result.kl_mean"]) == ("failed", "")
    assert list(first)[:5] == ["model", "cache", "cache_kind", "measurement", "status"]


def test_styles_differ_and_baselines_are_grey() -> None:
    names = [f"c{i}" for i in range(24)]
    found = plots.styles([*names, "dynamic"], ["dynamic"])
    assert len({str(found[name]) for name in names}) == 24
    assert found["dynamic"]["color"] == plots.GREY


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"),
        (0.09996, "0.100"),
        (1234.5, "1,234"),
        (1.3e-13, "1.30e−13"),
        (-2.5, "−2.50"),
        (0, "0"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_significant_digits(value, text) -> None:
    assert significant(value) == text


def test_sizes() -> None:
    assert [size(x) for x in (0, 1023, 1536, 50 << 20, None)] == [
        "0 B", "1,023 B", "1.50 KiB", "50.0 MiB", "–",
    ]  # fmt: skip


def test_a_measurement_brings_its_own_section(tmp_path, monkeypatch) -> None:
    """Two files add a measurement: its figures, what they mean, and how they are shown."""

    class Own:
        meaning = "How wet it is."

        @staticmethod
        def section(found):
            assert list(found["wetness"]) == [3, 4]
            caches = found.index.get_level_values("cache")
            return Section("Rain", [Text("It rains."), Table(pd.DataFrame({"cache": caches}))])

    rows = [row("rain", {"wetness": 3}, "a"), row("rain", {"wetness": 4}, "b")]
    page = report(rows, tmp_path)[0]
    assert "<h2>rain</h2>" in page
    assert ["b", "4"] in Tables(page).rows
    monkeypatch.setitem(registry.MEASUREMENTS, "rain", Own)
    page = report(rows, tmp_path)[0]
    assert "<h2>Rain</h2>" in page
    assert "How wet it is." in page
    assert ["b"] in Tables(page).rows


def test_settings_and_versions_are_a_table(tmp_path) -> None:
    versions = VERSIONS | {"packages": {"hqq": "0.2.8"}}
    page, markdown, _ = report([needle() | {"versions": versions}], tmp_path)
    cells = Tables(page).rows
    for line in (["torch", "2.11.0"], ["hqq", "0.2.8"], ["options of needle", "text: road.txt"]):
        assert line in cells
        assert f"| {' | '.join(line)} |" in markdown
    assert "{&#34;" not in page


def test_every_option_of_every_cache(tmp_path) -> None:
    rows = [needle("a"), needle("b")]
    for each, bits in zip(rows, (3, 4), strict=True):
        each["cache"]["options"] = {"bits": bits, "window": 32}
    page = report(rows, tmp_path)[0]
    assert ["b", "4"] in Tables(page).rows
    assert "In all: window 32." in page


def test_points_that_failed_say_why(tmp_path) -> None:
    rows = [memory("k3v3", {512: 1000})]
    rows[0]["result"]["points"].append({"batch": 1, "context": 1024, "error": "out of memory"})
    page = report(rows, tmp_path)[0]
    assert "out of memory" in Tables(page).rows[-1]


def test_thousands_of_rows(tmp_path) -> None:
    rows = [row("new", {"figure": i, "points": [{"x": 1}]}, f"c{i % 50}") for i in range(3000)]
    rows += [perplexity(f"p{i}", 2 + i % 71 / 10, 1 / (1 + i)) for i in range(500)]
    begin = time.perf_counter()
    page = report(rows, tmp_path)[0]
    assert time.perf_counter() - begin < 30
    assert page.count("<tr") > 7000


def test_wide_tables_and_reasons_wrap_where_there_is_little_room(tmp_path) -> None:
    """Rows become paragraphs, in which every figure has its head before it."""
    warned = perplexity("b", 2.5, 0.1, warnings=["the stored codes are not read"])
    page = report([perplexity("a", 2.0, 0.1), warned, FAILED], tmp_path)[0]
    parts = dict(re.findall(r'<div class="(wide|reasons)">\s*(.*?)</table>', page, re.S)[::-1])
    assert FAILED["error"] in parts["reasons"]
    assert page.count('<div class="reasons">') == 2
    for head, shown in (("KL mean", "0.100"), ("95% interval", "+0.83% to +2.50%")):
        assert re.search(
            rf'<td [^>]*data-head="{head}"[^>]*>{re.escape(shown)}</td>', parts["wide"]
        )
    assert 'data-head="cache"' not in page  # texts speak for themselves
    style = page[: page.index("</style>")]
    for kind in ("wide", "reasons"):
        narrow = [x for x in style.split("@media") if "max-width" in x[:20] and f".{kind}" in x]
        assert any("display: block" in x and "thead" in x for x in narrow), kind


def test_what_is_wide_scrolls_by_itself(tmp_path) -> None:
    """On a phone: every table is in a box that scrolls, every plot takes the width there is."""
    page = report([perplexity("a", 2.0, 0.1), needle()], tmp_path)[0]
    assert page.count("<table") == page.count('<div class="scroll" tabindex="0"><table')
    assert not re.search(r'<svg[^>]* width="', page)
    assert 'name="viewport" content="width=device-width' in page
