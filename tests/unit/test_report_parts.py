"""The parts of a report: evaluations, comparing, writing; what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from pocketllm.errors import (
    ConfigError,
    ExtraError,
    OutputError,
    SourceError,
)
from pocketllm.format.output_file import check_target, write_atomically
from pocketllm.report import Evaluation, check_html, check_picture, compare, read_evaluations
from pocketllm.report.perplexity_section import Subject, perplexity_section
from tests.reports import paragraphs

# --- evaluations

SUBJECT = Subject(Path("small"), 5, ("dense", ""))
EVALUATION = {"perplexity": 12.5, "model": "m", "compressed": True, "text": "a/b.txt", "context": 32}


def test_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({**EVALUATION, "later": [1], "windows": None}))
    (found,) = read_evaluations(path)
    assert found.perplexity == 12.5 and found.setting == ("b.txt", 32, 0, 0)


def test_an_evaluation_against_a_dense_model(tmp_path: Path) -> None:
    against = {"model": "dense", "compressed": False, "perplexity": 10.0, "tasks": None}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({**EVALUATION, "against": against, "kl": 0.1}))
    own, other = read_evaluations(path)
    assert own.compressed and not other.compressed and other.perplexity == 10.0
    assert own.setting == other.setting
    path.write_text(json.dumps({**EVALUATION, "against": {**against, "perplexity": None}}))
    assert len(read_evaluations(path)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model": "m"}', "perplexity is None"),
        (None, "cannot be read"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({**EVALUATION, "against": 5}), "against is not a JSON object"),
    ],
)
def test_bad_evaluations(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SourceError, match=words):
        read_evaluations(path)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        *(("perplexity", value, "a number above 0") for value in (True, -3, 0, 10**400, -math.inf, "2", [2])),
        *(("model", value, "text") for value in (5, "a\0b", "\ud800", ["m"])),
        *(("compressed", value, "true or false") for value in (1, "yes")),
        *((key, value, "text") for key in ("text", "dtype", "adapter") for value in (7, True, {}, "a\0b")),
        *(
            (key, value, "an integer of at least 0")
            for key in ("context", "windows", "tokens", "bytes_on_disk")
            for value in ("abc", True, -1, 1.5, [1])
        ),
    ],
)
def test_fields_of_an_evaluation_have_a_type(key: str, value: object, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({**EVALUATION, key: value}))
    with pytest.raises(SourceError) as caught:
        read_evaluations(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: {key} is {value!r:.60}") and f", wanted {wanted}, as in" in said
    dense = {"model": "dense", "compressed": False, "perplexity": 10.0, key: value}
    path.write_text(json.dumps({**EVALUATION, "against": dense}))
    with pytest.raises(SourceError) as caught:
        read_evaluations(path)
    assert str(caught.value).startswith(f"{path}: against: {key} is ")


def test_a_perplexity_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for value in (math.inf, math.nan):
        path.write_text(json.dumps({**EVALUATION, "perplexity": value}))
        (found,) = read_evaluations(path)
        section = perplexity_section([found], "", SUBJECT)
        assert section.tables and not section.charts


def test_perplexities_side_by_side() -> None:
    compressed = Evaluation(20.0, "small", True, "t", 8, 1, 7)
    section = perplexity_section([compressed, Evaluation(10.0, "dense", False, "t", 8, 1, 7)], "", SUBJECT)
    assert section.charts[0].table.rows[0][-1] == "2.000×" and len(paragraphs(section)) == 1
    section = perplexity_section([compressed, Evaluation(10.0, "dense", False, "t", 9, 1, 8)], "", SUBJECT)
    assert section.charts[0].table.rows[0][-1] == "–" and "no figure of the dense" in paragraphs(section)[1]
    other = Evaluation(math.inf, "small", True, bytes_on_disk=7)
    section = perplexity_section([other], "", SUBJECT)
    assert not section.charts and "of 7 bytes, this model has 5" in paragraphs(section)[-1]


def test_an_evaluation_of_another_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def minds(e: Evaluation, *dense: str) -> list[str]:
        subject = Subject(tmp_path / "small", 5, dense or ("dense",))
        return [p for p in paragraphs(perplexity_section([e], "", subject)) if p.startswith("Note: ")]

    monkeypatch.chdir(tmp_path)
    for name in ("small", "./small", "../" + tmp_path.name + "/small", str(tmp_path / "small")):
        assert not minds(Evaluation(2.0, name, True, bytes_on_disk=5))
    for name in ("other", "/nowhere/small", "~nobody/small", "owner/small", "x" * 300, "builtin:nothing"):
        (said,) = minds(Evaluation(2.0, name, True, bytes_on_disk=5))
        assert f"the evaluation is of {name}, which is not the folder of this model" in said
    for name in ("dense", "./dense", str(tmp_path / "dense")):
        assert not minds(Evaluation(2.0, name, False))
        assert not minds(Evaluation(2.0, name, False), "builtin:old", "dense")
    (said,) = minds(Evaluation(2.0, "second", False), "dense", "")
    assert said == "Note: the dense figure is of second, this model was compressed from dense."


# --- comparing


def test_compare_refuses(small: Path, copy: Path) -> None:
    with pytest.raises(ConfigError, match="no model to compare"):
        compare([])
    with pytest.raises(ConfigError, match="given twice"):
        compare([small, small])
    one = Evaluation(2.0, str(small), True, "t", 8)
    with pytest.raises(ConfigError, match="not among the models"):
        compare([copy], [one])
    with pytest.raises(ConfigError, match="different settings"):
        compare([small, copy], [one, Evaluation(2.0, str(copy), True, "t", 9)])


def test_compare_takes_one_figure_of_a_model(small: Path, source: Path, copy: Path) -> None:
    def dense(perplexity: float, name: str = str(source), dtype: str = "") -> Evaluation:
        return Evaluation(perplexity, name, False, "t", 8, dtype=dtype)

    models = [small, copy]
    found = compare(models, [dense(2.0), dense(2.00001, f"{source}/../{source.name}")])
    assert found.dense_perplexity == 2.0 and not found.notes
    for other in (dense(2.1), dense(2.0, "another"), dense(3.0, "another")):
        words = (
            rf"{source} \(perplexity 2\) and {other.model} \(perplexity {other.perplexity:g}\), wanted one"
        )
        with pytest.raises(ConfigError, match=words):
            compare(models, [dense(2.0), other])
    with pytest.raises(ConfigError, match=r"\(perplexity 2, a\) and .* \(perplexity 3, b\)"):
        compare(models, [dense(2.0, dtype="a"), dense(3.0, dtype="b")])
    one = Evaluation(4.0, str(small), True, "t", 8)
    with pytest.raises(
        ConfigError, match=r"\(perplexity 4\) and .*\(perplexity 5\), wanted one value for the same"
    ):
        compare(models, [one, Evaluation(5.0, str(small), True, "t", 8)])
    assert compare(models, [one, dense(math.inf), one, dense(math.inf)]).models[0].perplexity == 4.0


def test_compare_notes_a_dense_figure_of_another_model(small: Path, source: Path, copy: Path) -> None:
    found = compare([small, copy], [Evaluation(2.0, "another", False)])
    assert found.notes == (
        f"Note: the dense figure is of another; the models were compressed from {source}.",
    )
    assert found.to_dict()["notes"] == found.notes and found.dense_perplexity == 2.0
    assert not compare([small, copy], [Evaluation(2.0, str(source), False)]).notes


def test_compare_names_and_means(small: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "deeper" / "small")
    found = compare([small, copy, tmp_path / "deeper" / "small"], [Evaluation(2.0, str(copy), True)])
    assert [m.name for m in found.models] == [str(small), "copy", str(tmp_path / "deeper" / "small")]
    assert [m.perplexity for m in found.models] == [None, 2.0, None]
    assert found.models[0].proxy_error is None and found.models[0].nmse_blocks


# --- drawing


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_package_that_is_not_installed(
    package: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketllm.report import html_report

    monkeypatch.setitem(sys.modules, package, None)
    if package == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[report\]'"):
            check_picture(tmp_path / "x.png")
    with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[report\]'"):
        html_report(small, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


# --- writing


def test_outputs_inside_a_model_are_refused(small: Path, source: Path, copy: Path, tmp_path: Path) -> None:
    from pocketllm.report import html_report, save_picture

    before = sorted(small.parent.rglob("*"))
    compared = compare([copy, small])
    for place in (small, small / "new"):
        words = f"{place}/x.*: is inside {small}, which must stay unchanged; choose another output file"
        with pytest.raises(OutputError, match=words):
            html_report(small, place / "x.html")
        with pytest.raises(OutputError, match=words):
            save_picture(compared, place / "x.png")
    with pytest.raises(OutputError, match=f"is inside {source}"):
        html_report(small, source / "x.html", against=str(source))
    assert sorted(small.parent.rglob("*")) == before
    assert len(save_picture(compared, tmp_path / "x.png")) == 2


def test_outputs_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a folder"):
        check_html(tmp_path / "folder.html")
    with pytest.raises(OutputError, match="is a file, wanted a folder"):
        check_target(tmp_path / "file" / "x.html")
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        check_html(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"ends in \.png or \.svg"):
        check_picture(tmp_path / "x.pdf")

    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied"):
        check_html(tmp_path / "x.html")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EIO, "cannot be written")],
)
def test_a_write_that_fails_leaves_nothing(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x.html").write_text("before")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=words):
        write_atomically(tmp_path / "x.html", b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]
    assert (tmp_path / "x.html").read_text() == "before"
