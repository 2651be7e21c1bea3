"""How studies are shown: prose and tables from templates, pictures from data; and which room imports which."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
from matplotlib.figure import Figure

import pocketllm
from pocketllm.errors import ExtraError
from pocketllm.studies import STUDIES, load, run_study
from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import grouped, lowest, select
from pocketllm.studies.measure.significance import Difference
from pocketllm.studies.show import numbers, plot
from pocketllm.studies.show.prose import Prose, need_jinja, prose
from pocketllm.studies.verdicts import Verdict, above_zero, holds, together
from tests.studies import Counting

PACKAGE = Path(pocketllm.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "studies"
ROOMS = ("measure", "show", "claims")  # each may import the rooms before it


@pytest.mark.parametrize("name", STUDIES)
def test_a_template_has_every_section(name: str) -> None:
    assert list(prose(name).sections) == ["Claim", "Method", "Left out", "Findings", "Tables"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_finding_has_its_words(name: str) -> None:
    assert [finding.claim for finding in load(name).declared] == list(prose(name).claims)


def test_sentences_are_below_their_claims_and_paragraphs_one_line() -> None:
    words = Prose(
        "{% macro twice(x) %}{{ 2 * x }}{% endmacro %}",
        {
            "Plain": "some\n words",
            "Findings": "## it is two\none {{ twice(a) }}\n  of two\n## it is b\n{{ b | number(2) }} - c",
        },
    )
    assert words.text("Plain") == "some words" and words.text("None") == ""
    assert words.sentence("it is two", a=2) == "one 4 of two"
    assert words.sentence("it is b", b=None) == "not finite - c"
    with pytest.raises(jinja2.UndefinedError, match="'b' is undefined"):
        words.sentence("it is b", a=2)


def test_a_finding_is_judged_sentence_by_sentence() -> None:
    def numbers(results: Results) -> Iterator[Values]:
        yield from ({"gap": gap} for gap in results["step"]["gaps"])

    gaps = [Difference(1.0, 0.1), Difference(-1.0, 0.1), Difference(1.0, math.inf), None]
    finding = Finding("the gap is above zero", numbers, lambda values: above_zero(values["gap"]))
    found = [values["verdict"] for values in finding.judged({"step": {"gaps": gaps}})]
    assert found == ["held", "did not hold", "not seen", "not seen"]
    assert Finding("nothing", numbers).judged({"step": {"gaps": gaps[:1]}}) == [{"gap": gaps[0]}]


@pytest.mark.parametrize(
    ("name", "verdicts"),
    [
        ("rln", ["did not hold"]),
        ("overfit", ["held in part"]),
        ("depth", ["did not hold", "not seen"]),
        ("codebook", ["held"]),
        ("utilization", ["did not hold"]),
        ("sensitivity", ["held", "held", "did not hold"]),
        ("decoder", ["did not hold"]),
        ("overhead", []),
        ("robustness", ["did not hold"]),
    ],
)
def test_verdicts_on_the_committed_results(name: str, verdicts: list[str]) -> None:
    results = json.loads((DOCS / name / "result.json").read_text(encoding="utf-8"))["results"]
    judged = (values for finding in load(name).declared for values in finding.judged(results))
    assert [values["verdict"] for values in judged if "verdict" in values] == verdicts


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([Verdict.HELD, Verdict.HELD], Verdict.HELD),
        ([Verdict.HELD, Verdict.FAILED], Verdict.IN_PART),
        ([Verdict.NOT_SEEN, Verdict.HELD], Verdict.IN_PART),
        ([Verdict.IN_PART, Verdict.FAILED], Verdict.IN_PART),
        ([Verdict.NOT_SEEN, Verdict.NOT_SEEN], Verdict.NOT_SEEN),
        ([Verdict.NOT_SEEN, Verdict.FAILED], Verdict.FAILED),
        ([holds(False)], Verdict.FAILED),
    ],
)
def test_a_claim_of_several_parts(parts: list[Verdict], whole: Verdict) -> None:
    assert together(parts) == whole


def test_entries_are_selected_by_their_keys() -> None:
    keys = ("tuned.5.1.0.016", "tuned.3.4.0.005", "other.5.1.0.016", "grid.4x256", "tuned.x")
    results = {key: {"end": [0.2, None if "5.1" in key else 0.1]} for key in keys}
    found = select(results, "tuned.{depth}.{times}.{rate}")
    assert [(e["depth"], e["times"], e["rate"]) for e in found] == [(5, 1, 0.016), (3, 4, 0.005)]
    assert [(e["d"], e["k"]) for e in select(results, "grid.{d}x{k}")] == [(4, 256)]
    assert select(results, "tuned.{what}")[-1]["what"] == "x"
    assert lowest(found, "end") is found[1] and lowest(found[:1], "end") is None
    assert grouped([{"k": 2}, {"k": 1}, {"k": 2, "n": 3}], "k") == {2: [{"k": 2}, {"k": 2, "n": 3}]}


def test_tables_are_rows_between_bars() -> None:
    text = """## Of {{ n }}
| a | b, c |
{% for i in range(n) %}
| {{ i }}
  of {{ n }} | |
{% endfor %}

A note
on two lines.
## Empty
| only | this |
"""
    first, second = Prose("", {"Tables": text}).tables(n=2)
    assert (first.title, first.header) == ("Of 2", ["a", "b, c"])
    assert first.rows == [["0 of 2", ""], ["1 of 2", ""]] and first.note == "A note on two lines."
    assert (second.title, second.header, second.rows, second.note) == ("Empty", ["only", "this"], [], "")


def test_a_number_that_is_not_finite_has_no_error() -> None:
    assert numbers.with_error(Difference(0.5, 0.1)) == "0.500 ± 0.10"
    assert numbers.with_error(Difference(float("nan"), 0.1)) == "not finite"
    assert numbers.with_error(Difference(0.5, float("inf"))) == "0.500"
    assert numbers.compared(Difference(-0.3, 0.1, 7)) == "0.30 lower, beyond noise (± 0.24 at 95 %)"


def test_without_jinja_nothing_is_measured(
    counting: Counting, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ExtraError, match=r"need jinja2; install it with: pip install 'pocketllm-codec\[studies\]'"
    ):
        need_jinja()
    with pytest.raises(ExtraError, match="jinja2"):
        run_study("counting", str(source), tmp_path / "out")
    assert not counting.ran and not list(tmp_path.iterdir())
    assert (
        load("rln").words.text("Claim").startswith("Inside encoder and decoder")
    )  # words without numbers need none


def test_a_picture_is_drawn_as_it_says() -> None:
    style = plot.look(0)
    first = plot.Panel(
        "first",
        [
            plot.series([{"a": 1, "b": 2.0}, {"a": 10, "b": 3.0}], "a", "b", style, "line"),
            plot.mean_points({1.0: [2.0, 4.0], 2.0: [None, 1.0]}, style, "means"),
            plot.mark("axhline", 2.5, color="black"),
            plot.mark("text", 0.5, 2.5, "here", ha="left"),
        ],
        x=plot.Axis("x", "log", ticks=[1, 10], reverse=True),
        y=plot.Axis("y", low=0),
        legend={"fontsize": 8},
    )
    known, unknown = Difference(1.0, 0.1, 7), Difference(2.0, math.inf)
    bars = plot.interval_bars(["a", "b"], [known, unknown], whiskers=2, color="black")
    second = plot.Panel("second", [bars], small=True)
    figure = Figure(layout="constrained")
    part = plot.Part([[first, second]], legend=plot.Legend({"fontsize": 9}, [("red", "patch")]), level=True)
    plot.draw(plot.Picture(6, 4, [part, plot.Part([[second]])], (2, 1)), figure)
    assert tuple(figure.get_size_inches()) == (6, 4)
    top, bottom = figure.subfigs
    axes, beside = top.axes
    assert axes.get_title() == "first" and axes.get_xscale() == "log" and axes.xaxis_inverted()
    assert axes.get_ylim() == beside.get_ylim() and axes.get_ylim()[0] == 0
    assert [words.get_text() for words in axes.get_legend().get_texts()] == ["line", "means"]
    assert [words.get_text() for words in top.legends[0].get_texts()] == ["patch"]
    line, means = axes.lines[0], axes.containers[0]
    assert line.get_xydata().tolist() == [[1, 2.0], [10, 3.0]] and [t.get_text() for t in axes.texts] == [
        "here"
    ]
    assert means.lines[0].get_xydata().tolist() == [[1.0, 3.0]]  # none where a value is missing
    assert [bar.get_width() for bar in beside.patches] == [1.0, 2.0]
    whiskers = beside.containers[0].lines[2][0].get_segments()
    assert [round(float(ends[1][0] - ends[0][0]), 6) for ends in whiskers] == [
        round(2 * known.margin, 6),
        0.0,
    ]
    assert len(bottom.axes) == 1


def test_groups_are_side_by_side() -> None:
    first, second = plot.dots({"a": [[1.0, 3.0]], "b": [[2.0, 2.0]]})
    assert first.values == ([-0.15], [2.0], [pytest.approx(2**0.5)]) and first.style["label"] == "a"
    assert second.values == ([0.0], [2.0], [0.0])
    upward = plot.mean_series([{"x": "2", "y": [1.0]}, {"x": 1, "y": [4.0]}], "x", "y", plot.look(0))
    assert upward.values == ([1.0, 2.0], [4.0, 1.0], [0.0, 0.0])


def modules() -> list[Path]:
    return sorted((PACKAGE / "studies").rglob("*.py"))


@pytest.mark.parametrize("path", [p for p in modules() if p.parent.name in ROOMS], ids=lambda p: p.name)
def test_rooms_import_only_rooms_before_them(path: Path) -> None:
    room = ROOMS.index(path.parent.name)
    names = [
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    later = tuple(f"pocketllm.studies.{name}" for name in ROOMS[room + 1 :])
    assert [name for name in names if later and name.startswith(later)] == []


def test_no_module_of_studies_has_the_name_of_another() -> None:
    own = [path.name for path in modules() if path.name != "__init__.py"]
    others = {path.name for path in PACKAGE.rglob("*.py") if path not in modules()}
    assert len(set(own)) == len(own) and not set(own) & others
