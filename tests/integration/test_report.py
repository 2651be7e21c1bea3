"""`pocketllm report` and `compare`: the commands, and the page itself."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests import reports
from tests.commands import Run
from tests.reports import MEASURE

HOSTILE = '<script>alert("x")</script>&$x^2$'


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reports.make(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """A page with everything on it."""
    return reports.full_page(folder)


def test_report(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.html"
    text = folder / "text.txt"
    found = run.json("report", folder / "small", "-o", output, "--ppl", text, *MEASURE)
    assert found["output"] == str(output) and found["bytes"] == output.stat().st_size
    assert not found["absent"] and not found["missing"] and found["command"].startswith("pocketllm compress ")
    compressed, dense = found["evaluations"]
    assert compressed["compressed"] and not dense["compressed"] and dense["perplexity"] > 1
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    assert f"{dense['perplexity']:.4g}" in output.read_text(encoding="utf-8")


def test_report_without_measuring(run: Run, folder: Path) -> None:
    code, out, err = run("report", folder / "moe")
    assert code == 0 and "moe.html" in out and "perplexity: Not measured" in err and "weights:" in err
    assert Page(folder / "moe.html").all("svg")
    code, _, err = run("report", folder / "moe", "--quiet", "--no-check")
    assert code == 0 and not err


def test_report_of_a_model_whose_dense_one_is_gone(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "other", tmp_path / "other")
    path = tmp_path / "other" / "pocketllm.json"
    values = json.loads(path.read_text())
    values["model"] = HOSTILE
    values["skipped"][0]["reason"] = HOSTILE
    path.write_text(json.dumps(values))
    found = run.json("report", tmp_path / "other", "--ppl", folder / "text.txt", *MEASURE)
    assert "--against" in found["absent"]["weights"] and len(found["evaluations"]) == 1
    page = Page(tmp_path / "other.html")
    assert not page.all("script") and "<script" not in page.source and "&lt;script&gt;" in page.source
    assert "no figure of the dense model" in page.source
    found = run.json("report", tmp_path / "other", "--against", folder / "dense")
    assert "weights" not in found["absent"]


def test_report_with_evaluations_from_files(run: Run, folder: Path, tmp_path: Path) -> None:
    files = []
    for name in ("small", "dense"):
        values = run.json("eval", folder / name, "--ppl", folder / "text.txt", *MEASURE)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(values))
    options = [word for path in files for word in ("--evaluation", str(path))]
    found = run.json("report", folder / "small", "-o", tmp_path / "x.html", *options)
    assert [e["compressed"] for e in found["evaluations"]] == [True, False]
    table = run.json("compare", folder / "small", folder / "other", *options)
    assert table["models"][0]["perplexity"] == found["evaluations"][0]["perplexity"]
    assert table["models"][1]["perplexity"] is None and table["dense_perplexity"]


def test_evaluations_of_other_models_are_told(run: Run, folder: Path, tmp_path: Path) -> None:
    small = folder / "small"
    facts = {"perplexity": 2.5, "text": "t", "context": 32, "windows": 2, "tokens": 62}
    nbytes = sum(path.stat().st_size for path in small.iterdir())
    own = {**facts, "model": "elsewhere/small", "compressed": True, "bytes_on_disk": nbytes}
    dense = {**facts, "model": str(folder / "moe-dense"), "compressed": False}
    for name, values in {"own": own, "dense": dense, "bad": {**dense, "tokens": [1]}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    files = [word for name in ("own", "dense") for word in ("--evaluation", tmp_path / f"{name}.json")]
    assert run("report", small, "-o", tmp_path / "x.html", *files)[0] == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Note: the evaluation is of elsewhere/small, which is not the folder" in page
    assert f"Note: the dense figure is of {folder / 'moe-dense'}, this model was compressed from" in page
    code, _, err = run("compare", small, *files[2:])
    assert code == 0 and f"Note: the dense figure is of {folder / 'moe-dense'};" in " ".join(err.split())
    for command in ("report", "compare"):
        code, out, err = run(command, small, "--evaluation", tmp_path / "bad.json")
        assert code == 1 and not out and "bad.json: tokens is [1], wanted an integer of at least 0" in err


def test_the_same_model_gives_the_same_page(page: Path, folder: Path) -> None:
    from pocketllm.report import html_report

    first = html_report(folder / "other", folder / "a.html").output.read_bytes()
    assert html_report(folder / "other", folder / "b.html").output.read_bytes() == first


def test_the_page_needs_nothing_else(page: Path) -> None:
    found = Page(page)
    assert not found.open
    for _, attributes in found.tags:
        for key in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:")), value
    assert not found.all("script") and "@import" not in found.source
    assert not re.search(r"url\((?!#)", found.source)


def test_the_page_is_put_together_well(page: Path) -> None:
    found = Page(page)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert max(Counter(ids).values()) == 1
    for _, attributes in found.tags:
        for key in ("href", "aria-labelledby"):
            value = attributes.get(key) or ""
            if key == "aria-labelledby" or value.startswith("#"):
                assert not value or value.removeprefix("#") in ids
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(headings))
    assert len(found.all("section")) == 8 == len(found.all("nav")) * 8
    for svg in re.findall(r"<svg.*?</svg>", found.source, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_every_chart_has_its_numbers_and_words(page: Path) -> None:
    figures = re.findall(r"<figure.*?</figure>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(figures) >= 12
    for figure in figures:
        assert "<figcaption" in figure and "<table>" in figure and "<caption>" in figure
        label = re.search(r'role="img" aria-label="([^"]+)"', figure)
        assert label is not None and len(label[1]) > 40
        rows = figure.count("<tr>")
        assert ("<details>" in figure) == (rows > 13)


def test_the_heat_map_says_what_its_table_says(page: Path, folder: Path) -> None:
    report = json.loads((folder / "small" / "pocketllm.json").read_text())
    matrix = next(m for m in report["matrices"] if m["name"] == "model.layers.1.mlp.up_proj.weight")
    source = page.read_text(encoding="utf-8")
    assert f"{matrix['nmse']:.3g}" in source and f"{matrix['proxy_error']:.3g}" in source


def test_compare(run: Run, folder: Path, tmp_path: Path) -> None:
    models = [folder / "small", folder / "other"]
    text = folder / "text.txt"
    found = run.json("compare", *models, "-o", tmp_path / "both.svg", "--ppl", text, *MEASURE)
    assert [m["name"] for m in found["models"]] == ["small", "other"]
    for m, path in zip(found["models"], models, strict=True):
        assert m["bytes_on_disk"] == sum(p.stat().st_size for p in path.iterdir())
        assert m["perplexity"] > 1 and m["nmse"] > 0
    assert found["models"][0]["proxy_error"] > 0 and found["models"][1]["proxy_error"] is None
    assert found["dense_perplexity"] > 1 and found["setting"]["windows"] == 2
    assert found["pictures"] == [str(tmp_path / "both.png"), str(tmp_path / "both.svg")]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "both.svg")


@pytest.mark.parametrize("command", ["report", "compare"])
def test_says_what_is_wanted_instead(command: str, run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run(command, folder / "small", "--against", folder / "other", "--ppl", folder / "text.txt")
    assert code == 2 and "is already compressed; name the dense model" in err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    code, _, err = run(command, tmp_path / "a")
    said = " ".join(err.split())
    assert code == 1 and "an adapter; name the compressed model it was trained on" in said
    assert f"'pocketllm {command} MODEL --adapter {tmp_path / 'a'}'" in said


def test_compare_prints_a_table(run: Run, folder: Path) -> None:
    code, out, err = run("compare", folder / "small", folder / "other", folder / "moe")
    assert code == 0 and "bytes on disk" in out and "moe" in out and "check" in err
    assert "perplexity" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["report", "DENSE"], 1, "not a model compressed by pocketllm"),
        (["report", "nowhere"], 1, "nowhere"),
        (["report", "SMALL", "-o", "FOLDER.html"], 1, "is a folder"),
        (["report", "SMALL", "-o", "OUT.txt"], 2, "ends in .html"),
        (["report", "SMALL", "-o", "OUT.html", "--against", "./nowhere"], 1, "no such folder"),
        (["report", "SMALL", "-o", "OUT.html", "--against", "SMALL"], 2, "name the dense model"),
        (["report", "SMALL", "-o", "OUT.html", "--ppl", "nowhere.txt"], 1, "nowhere.txt"),
        (["report", "SMALL", "-o", "OUT.html", "--ppl", "TEXT", "--windows", "-1"], 2, "--windows"),
        (
            ["report", "SMALL", "-o", "OUT.html", "--ppl", "TEXT", *MEASURE, "--against", "SMALL"],
            2,
            "already compressed",
        ),
        (["report", "SMALL", "-o", "OUT.html", "--evaluation", "TEXT"], 1, "not JSON"),
        (["report", "SMALL", "-o", "INSIDE.html", "--ppl", "nowhere.txt"], 1, "which must stay unchanged"),
        (
            ["compare", "SMALL", "OTHER", "-o", "INSIDE.svg", "--ppl", "nowhere.txt"],
            1,
            "which must stay unchanged",
        ),
        (["compare"], 2, "Missing argument"),
        (["compare", "SMALL", "DENSE"], 1, "not a model compressed by pocketllm"),
        (["compare", "SMALL", "-o", "OUT.jpg"], 2, ".png or .svg"),
        (["compare", "SMALL", "SMALL"], 2, "given twice"),
    ],
)
def test_errors(arguments: list[str], code: int, words: str, run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    places = {"DENSE": folder / "dense", "SMALL": folder / "small", "TEXT": folder / "text.txt"}
    places |= {"OTHER": folder / "other", "FOLDER.html": tmp_path / "folder.html"}
    places |= {f"INSIDE.{suffix}": folder / "small" / f"x.{suffix}" for suffix in ("html", "svg")}
    places |= {f"OUT.{suffix}": tmp_path / f"out.{suffix}" for suffix in ("txt", "html", "jpg")}
    found, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert found == code, err
    assert words in err and not out and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]
    assert not list((folder / "small").glob("x.*"))


@pytest.mark.parametrize("command", ["report", "compare"])
def test_help_has_examples(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"pocketllm {command}" in out and "Examples" in out
