"""The frame around the studies: steps, resuming, refusing, what is written; with a study of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm import cli
from pocketllm.errors import ConfigError, OutputError, SourceError
from pocketllm.studies import STUDIES, dry_run, registry, run_study
from pocketllm.studies.definition import Setup
from tests import tiny
from tests.studies import Counting


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("studies") / "dense"))


def test_writes_everything(counting: Counting, model: str, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    done = run_study("counting", model, tmp_path / "out", progress=lambda *step: told.append(step))
    assert sorted(p.name for p in done.files) == [
        "counting.md",
        "counting.png",
        "counting.svg",
        "result.json",
    ]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == done.result
    assert result["results"]["c"] == {"value": None}
    assert result["findings"] == ["3 steps ran."]
    threads = torch.get_num_threads()
    assert result["command"] == f"pocketllm study counting {model} -o {tmp_path / 'out'} --threads {threads}"
    assert result["config"]["threads"] == threads
    assert {"processor", "threads", "versions"} <= set(result["machine"])
    assert result["config"]["texts"] == {}
    page = (tmp_path / "out" / "counting.md").read_text()
    assert "It counts." in page and "3 steps ran." in page and "| a | a\\_b\\`\\|c |" in page
    assert (tmp_path / "out" / "counting.png").read_bytes().startswith(b"\x89PNG")
    assert "POCKETLLM_DATA" not in page and "calibrated on" not in page
    assert not (tmp_path / "out.partial").exists()
    assert told[0] == ("a", 0.0) and told[-1] == ("", 1.0)
    assert [share for _, share in told] == sorted(share for _, share in told)


def test_the_page_of_the_small_version_says_what_it_leaves_out(
    counting: Counting, model: str, tmp_path: Path
) -> None:
    counting.words = {"Left out": "no steps."}
    for quick in (True, False):
        run_study("counting", model, tmp_path / str(quick), quick=quick)
        page = (tmp_path / str(quick) / "counting.md").read_text()
        assert ("**Measured.** Steps. **This is the small version:** no steps." in page) is quick


def test_refuses_what_is_there(counting: Counting, model: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a study of 'counting'"):
        run_study("counting", model, tmp_path / "out", overwrite=True)
    run_study("counting", model, tmp_path / "own")
    with pytest.raises(OutputError, match="--overwrite"):
        run_study("counting", model, tmp_path / "own")
    run_study("counting", model, tmp_path / "own", overwrite=True)
    assert len(counting.ran) == 6


def test_an_output_inside_the_model_is_refused(counting: Counting, tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "dense")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(model)
    for name in (model, tmp_path / "link"):
        with pytest.raises(
            OutputError, match=r"dense/deep/out: is inside .*which must stay unchanged; choose another"
        ):
            run_study("counting", str(name), model / "deep" / "out")
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before and not counting.ran
    run_study("counting", str(model), tmp_path / "dense-out")


def test_a_study_that_fails_at_once_leaves_nothing(counting: Counting, model: str, tmp_path: Path) -> None:
    counting.stop_at = "a"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    counting.stop_at = "b"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, tmp_path / "out")
    assert (tmp_path / "out.partial" / "step-a.json").is_file()


@pytest.mark.parametrize("name", ["codebook", "decoder", "sensitivity", "robustness", "overhead"])
def test_a_missing_tokenizer_is_found_first(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "dense")
    with pytest.raises(SourceError, match="has no tokenizer"):
        run_study(name, str(tmp_path / "dense"), tmp_path / "out", quick=True)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["codebook", "decoder", "sensitivity", "robustness"])
def test_a_text_that_is_too_short_is_found_first(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(ConfigError, match=r"a\.txt: has 10 tokens, wanted \d+ .*name a longer text"):
        run_study(name, model, tmp_path / "out", quick=True, texts=[tmp_path / "a.txt"])
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["rln", "overfit", "depth", "codebook", "utilization"])
def test_a_matrix_that_is_too_small_is_named(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 16}
    small = str(tiny.save(tmp_path / "dense", **sizes))
    with pytest.raises(SourceError, match=r"^model\.layers\.\d\.mlp\.up_proj\.weight: 24 x 32 weights have"):
        run_study(name, small, tmp_path / "out", quick=True)
    assert not (tmp_path / "out.partial").exists()


def test_bad_input(counting: Counting, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not use text"):
        run_study("counting", model, tmp_path / "out", texts=["a.txt"])
    with pytest.raises(SourceError, match="no such folder"):
        run_study("counting", str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(SourceError, match="~nobody/model: no such folder"):
        run_study("counting", "~nobody/model", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ConfigError, match="unknown study 'nonsense'; known: rln"):
        registry.load("nonsense")


def test_a_compressed_model_is_refused(small: Path, source: Path, tmp_path: Path) -> None:
    words = rf"^{small}: is already compressed; name the dense model \(it was made from {source}\)$"
    for name in ("rln", "robustness"):
        with pytest.raises(ConfigError, match=words):
            run_study(name, str(small), tmp_path / "out", quick=True)
        with pytest.raises(ConfigError, match=words):
            dry_run(name, str(small), quick=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "saved").mkdir()  # as save_pretrained leaves one
    shutil.copy(small / "config.json", tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"already compressed; name the dense model$"):
        dry_run("rln", str(tmp_path / "saved"))


def test_default_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    setup = Setup("m", True, 0, "cpu", None, tmp_path)
    assert setup.evaluation_texts()[0].name == "Python's own documentation (held-out topics)"
    (tmp_path / "own.txt").write_text("some words")
    named = Setup("m", True, 0, "cpu", (str(tmp_path / "own.txt"),), tmp_path).evaluation_texts()
    assert [(t.name, t.text) for t in named] == [("own.txt", "some words")]


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / folder / "x.txt" for folder in ("a", "b")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"text {number}")
    named = Setup("m", True, 0, "cpu", tuple(map(str, files)), tmp_path).evaluation_texts()
    assert [(t.name, t.text) for t in named] == [(str(files[0]), "text 0"), (str(files[1]), "text 1")]


def test_texts_that_would_not_be_measured_are_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 100)
    (tmp_path / "b.txt").write_text("other words " * 100)
    two = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for name in ("codebook", "decoder", "sensitivity"):
        with pytest.raises(ConfigError, match=f"{name}: uses one text, got 2"):
            dry_run(name, model, texts=two)
    with pytest.raises(ConfigError, match=r"a\.txt: given twice"):
        dry_run("robustness", model, texts=[two[0], tmp_path / "." / "a.txt"])
    assert dry_run("robustness", model, quick=True, texts=two) == ["dense", "plain-8x", "plain-16x"]


# the command


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `pocketllm study`."""
    monkeypatch.setattr(sys, "argv", ["pocketllm", "study", *words])
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    return int(code or 0), *capsys.readouterr()


def test_command_help_lists_the_studies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = command(capsys, monkeypatch, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert all(f"{name}: {title}" in words for name, title in STUDIES.items())


def test_command_unknown_study(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    code, _, err = command(capsys, monkeypatch, "nonsense", model)
    assert code == 2 and "unknown study 'nonsense'; known: rln, overfit" in err
    code, _, err = command(capsys, monkeypatch, "rln", "./nowhere", "--dry-run")
    assert code == 1 and "nowhere" in err


def test_command_dry_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, monkeypatch, "depth", model, "--dry-run", "--json", "--quick")
    assert code == 0
    values = json.loads(out)
    assert values["study"] == "depth" and "published.5" in values["steps"]
    assert list(tmp_path.iterdir()) == []


def test_command_runs(
    counting: Counting,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("pocketllm.studies.load", lambda name: counting.study())
    output = tmp_path / "out"
    code, out, _ = command(capsys, monkeypatch, "counting", model, "-o", str(output), "--json", "--quiet")
    assert code == 0
    values = json.loads(out)
    assert values["findings"] == ["3 steps ran."] and values["output"] == str(output)
    assert values["files"] == [str(p) for p in sorted(output.iterdir())]
    code, out, _ = command(
        capsys, monkeypatch, "counting", model, "-o", str(output), "--overwrite", "--quiet"
    )
    assert code == 0 and "- 3 steps ran." in out and "all | of them" in out and "a_b`|c" in out
    code, _, err = command(capsys, monkeypatch, "counting", model, "-o", str(output))
    assert code == 1 and "pass --overwrite" in err


def test_titles_are_those_of_the_registry() -> None:
    for name, title in STUDIES.items():
        study = registry.load(name)
        assert (study.name, study.title) == (name, title)
        assert all(study.words.text(section) for section in ("Claim", "Method", "Left out"))
