"""A study that is begun again: finished steps are kept, damaged ones run again, other arguments are refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm.errors import ResumeError
from pocketllm.studies import run_study
from pocketllm.studies.measure.compressed_models import inputs
from tests.studies import Counting


@pytest.fixture
def model(source: Path) -> str:
    return str(source)


def test_goes_on_where_it_was(counting: Counting, model: str, tmp_path: Path) -> None:
    counting.stop_at = "c"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    counting.stop_at = None
    run_study("counting", model, tmp_path / "out")
    assert counting.ran == ["a", "b", "c"]


def half_done(counting: Counting, model: str, output: Path) -> Path:
    """The file of the first step of a study that stopped at the third."""
    counting.stop_at = "c"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, output)
    counting.stop_at = None
    return output.with_name(f"{output.name}.partial") / "step-a.json"


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b'{"seconds": 1.0, "val',
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"seconds": 1.0}',
        b'{"seconds": 1, "values": {}}',
        b'{"seconds": 1, "values": {}, "digest": 5}',
        b'{"seconds": 1.0, "values": {"value": 1.0}}',  # as it was before there was a digest
    ],
)
def test_a_damaged_step_runs_again(left: bytes, counting: Counting, model: str, tmp_path: Path) -> None:
    half_done(counting, model, tmp_path / "out").write_bytes(left)
    done = run_study("counting", model, tmp_path / "out")
    assert counting.ran == ["a", "b", "a", "c"]
    assert done.result["results"]["a"] == {"value": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("seconds", "x"), ("seconds", 7.5), ("values", {}), ("values", {"value": 1.5}), ("values", [])],
)
def test_a_step_whose_digest_does_not_fit_runs_again(
    key: str, value: Any, counting: Counting, model: str, tmp_path: Path
) -> None:
    file = half_done(counting, model, tmp_path / "out")
    kept = json.loads(file.read_text())
    assert kept.keys() == {"seconds", "values", "digest"} and kept["values"] == {"value": 1.0}
    file.write_text(json.dumps({**kept, key: value}))
    done = run_study("counting", model, tmp_path / "out")
    assert counting.ran == ["a", "b", "a", "c"]
    assert done.result["results"]["a"] == {"value": 1.0} and done.result["step_seconds"].keys() == set("abc")


def test_a_folder_in_the_place_of_a_step_is_named(counting: Counting, model: str, tmp_path: Path) -> None:
    file = half_done(counting, model, tmp_path / "out")
    file.unlink()
    (file / "mine").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"step-a\.json: a folder, wanted the file .*; move it away"):
        run_study("counting", model, tmp_path / "out")
    assert (file / "mine").is_dir() and counting.ran == ["a", "b"]
    file.rename(tmp_path / "away")
    run_study("counting", model, tmp_path / "out")
    assert counting.ran == ["a", "b", "a", "c"]


def test_the_command_can_be_run_again(
    counting: Counting, monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    counting.more = {"on_text": True}
    (tmp_path / "a text.txt").write_text("some words")
    output, text = str(tmp_path / "my study"), str(tmp_path / "a text.txt")
    monkeypatch.setenv("POCKETLLM_DATA", str(tmp_path))
    done = run_study("counting", model, output, quick=True, seed=3, texts=[text])
    assert shlex.split(done.result["command"]) == [
        *("pocketllm", "study", "counting", model, "-o", output, "--quick", "--seed", "3"),
        *("--threads", str(torch.get_num_threads()), "--text", text),
    ]
    done = run_study("counting", model, tmp_path / "other")
    assert done.result["command"].startswith("POCKETLLM_DATA=... pocketllm study")


def with_inputs(counting: Counting) -> dict[str, Any]:
    """What the study finds on the machine; to be changed."""
    found: dict[str, Any] = {"calibration": {"train.txt": "0123"}, "tasks": ["quiz"]}
    counting.more = {"inputs": lambda setup: found}
    return found


def test_inputs_are_noted_and_held_against(counting: Counting, model: str, tmp_path: Path) -> None:
    found = with_inputs(counting)
    counting.stop_at = "c"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, tmp_path / "out")
    counting.stop_at = None
    found["calibration"] = {"train.txt": "4567"}
    with pytest.raises(ResumeError, match=r"calibration\.train\.txt: '0123' then, '4567' now"):
        run_study("counting", model, tmp_path / "out")
    found["calibration"] = {"train.txt": "0123"}
    done = run_study("counting", model, tmp_path / "out")
    assert done.result["config"]["calibration"] == {"train.txt": "0123"}
    assert done.result["config"]["tasks"] == ["quiz"]
    assert "calibrated on train.txt; tasks: quiz" in (tmp_path / "out" / "counting.md").read_text()


def test_what_a_study_finds_is_told_by_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    default = inputs()["calibration"]
    assert list(default) == ["Python's own documentation"]
    monkeypatch.setenv("POCKETLLM_DATA", str(tmp_path))
    file = tmp_path / "wikitext2" / "wiki.train.first_part.txt"
    file.parent.mkdir()
    file.write_text("other words")
    named = inputs()["calibration"]
    assert list(named) == [file.name] and set(named.values()) != set(default.values())


def test_refuses_other_arguments(counting: Counting, model: str, tmp_path: Path) -> None:
    counting.stop_at = "b"
    with pytest.raises(KeyboardInterrupt):
        run_study("counting", model, tmp_path / "out")
    with pytest.raises(ResumeError, match="seed: 0 then, 3 now"):
        run_study("counting", model, tmp_path / "out", seed=3)
