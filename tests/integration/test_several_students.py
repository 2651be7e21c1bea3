"""One run of the teacher for several students, warm restarts, and learning from a share of the tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm.errors import ConfigError, OutputError, ResumeError
from pocketllm.format.workspace import locked
from tests import tiny
from tests.commands import digest
from tests.recovery import SENTENCE, config, make, stop_at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model `m`, two compressed forms `c` and `d`, a text, and a teacher's tokens `cache`."""
    folder = make(tmp_path_factory.mktemp("students"))
    pocketllm.compress(folder / "m", tiny.settings(codebook_size=16), folder / "d")
    pocketllm.distill(folder / "c", folder / "first", short(folder), teacher_cache=folder / "cache")
    return folder


def short(made: Path, **changes: Any) -> Any:
    return config(made, **{"steps": 3, "teacher_top_k": 4, **changes})


def test_the_teacher_runs_once_for_two_students(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pocketllm.distill(made / "c", tmp_path / "alone", short(made))
    assert digest(tmp_path / "alone") == digest(made / "first")
    pocketllm.distill(made / "d", tmp_path / "alone-d", short(made))

    def runs(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the teacher runs again")

    monkeypatch.setattr("pocketllm.recover.distill.open_teacher", runs)
    pocketllm.distill(made / "d", tmp_path / "second", short(made), teacher_cache=made / "cache")
    assert digest(tmp_path / "second") == digest(tmp_path / "alone-d")
    pocketllm.distill(made / "d", tmp_path / "longer", short(made, steps=4), teacher_cache=made / "cache")


def test_a_cache_of_something_else_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(SENTENCE * 41)
    teacher = tiny.save(tmp_path / "m", tie_word_embeddings=False)
    before = digest(made / "cache")
    for changes, teaching, key in (
        ({"texts": (str(tmp_path / "t.txt"),)}, {}, "text"),
        ({"teacher_top_k": 5}, {}, "teacher_top_k: 4 there, 5 here"),
        ({}, {"teacher": str(teacher)}, "teacher_weights"),
    ):
        with pytest.raises(
            ConfigError, match=rf"cache: holds the tokens of another teacher or text \(.*{key}"
        ):
            pocketllm.distill(
                made / "c", tmp_path / "o", short(made, **changes), teacher_cache=made / "cache", **teaching
            )
        shutil.rmtree(tmp_path / "o.partial")
    assert digest(made / "cache") == before
    with pytest.raises(ConfigError, match="--teacher-cache: needs the number of tokens"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher_cache=made / "cache")


def test_a_cache_that_cannot_be_used_is_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shutil.copytree(made / "cache", tmp_path / "damaged")
    (tmp_path / "damaged" / "teacher.json").write_text("{")
    for name in ("file", "damaged"):
        with pytest.raises(OutputError, match=rf"{name}: cannot be used as a cache of the teacher \("):
            pocketllm.distill(made / "c", tmp_path / "o", short(made), teacher_cache=tmp_path / name)
    shutil.copytree(made / "cache", tmp_path / "cut")
    tokens = tmp_path / "cut" / "teacher-ids.npy"
    tokens.write_bytes(tokens.read_bytes()[:200])
    with pytest.raises(ResumeError, match=r"teacher-ids\.npy: damaged .*; delete .*/cut to start again"):
        pocketllm.distill(made / "c", tmp_path / "o", short(made), teacher_cache=tmp_path / "cut")
    with locked(made / "cache"), pytest.raises(OutputError, match="cache: in use by another process"):
        pocketllm.distill(made / "c", tmp_path / "o", short(made), teacher_cache=made / "cache")


def test_a_run_with_warm_restarts_resumes_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    settings = config(made, steps=7, loop={"cycles": 2, "schedule": "linear"})
    done = pocketllm.distill(made / "c", tmp_path / "a", settings)
    assert done.kl_stored < done.kl_before
    steps = [json.loads(line) for line in (tmp_path / "a.log" / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "validation" in line] == [3, 4, 7]  # where a cycle ends, too
    for stop in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            pocketllm.distill(made / "c", tmp_path / "b", settings, progress=stop_at(stop))
    pocketllm.distill(made / "c", tmp_path / "b", settings)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_share_of_the_tokens_is_enough_to_learn(made: Path, tmp_path: Path) -> None:
    done = pocketllm.distill(made / "c", tmp_path / "o", config(made, token_share=0.5))
    assert done.kl_stored < done.kl_before
    with pytest.raises(ConfigError, match="token_share: got 0, wanted more than 0"):
        config(made, token_share=0)
