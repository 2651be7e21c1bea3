"""Runs that end early, killed or refused by the system: an output that is whole or absent, and resuming."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.compression.progress import Event
from pocketllm.errors import OutputError, ResumeError
from pocketllm.format import kept, workspace
from pocketllm.format.checkpoint import verify
from pocketllm.runtime.export import export
from tests import tiny
from tests.commands import contents, kill_now, killed, raised_in_a_copy


@pytest.mark.parametrize(
    ("stage", "number"), [("fit", 1), ("fit", 3), ("encode", 2), ("encode", 9), ("write", 1)]
)
def test_killed_and_started_again(stage: str, number: int, source: Path, small: Path, tmp_path: Path) -> None:
    seen = 0

    def progress(event: Event) -> None:
        nonlocal seen
        seen += event.stage == stage
        if seen == number:
            kill_now()

    killed(lambda: pocketllm.compress(source, tiny.settings(), tmp_path / "out", progress=progress))
    assert not (tmp_path / "out").exists()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)


def test_killed_while_it_cleans_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is whole by then; what is left of the work is still known as ours, and replaced."""
    original = workspace.shutil.rmtree

    def killed(path: Path, **keywords: Any) -> None:
        original(path, **keywords)
        if Path(path).name == "old":
            raise StoppedError

    monkeypatch.setattr(workspace.shutil, "rmtree", killed)
    pocketllm.compress(source, tiny.settings(seed=5), tmp_path / "out")
    with pytest.raises(StoppedError):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=True)
    verify(tmp_path / "out")
    assert (tmp_path / "out.partial" / "state.json").is_file()
    with pytest.raises(ResumeError, match="delete that folder"):
        pocketllm.compress(source, tiny.settings(seed=6), tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_before_the_state_was_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".state.json.tmp").write_text("{")
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_for_one_output(source: Path, small: Path, tmp_path: Path) -> None:
    """The second is turned away, and the first goes on undisturbed."""
    refusals: list[str] = []

    def progress(event: Event) -> None:
        if event.stage == "encode" and not refusals:
            with pytest.raises(OutputError) as caught:
                pocketllm.compress(source, tiny.settings(), tmp_path / "out")
            refusals.append(str(caught.value))

    pocketllm.compress(source, tiny.settings(), tmp_path / "out", progress=progress)
    assert "in use by another process" in refusals[0]
    assert contents(tmp_path / "out") == contents(small)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_another_process_created_meanwhile(
    overwrite: bool, source: Path, small: Path, tmp_path: Path
) -> None:
    def progress(event: Event) -> None:
        if event.stage == "write" and event.share == 0:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    def run() -> object:
        return pocketllm.compress(
            source, tiny.settings(), tmp_path / "out", progress=progress, overwrite=overwrite
        )

    if overwrite:
        run()
        assert contents(tmp_path / "out") == contents(small)
        return
    with pytest.raises(OutputError, match="out: was created by another process meanwhile; move it away and"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    shutil.rmtree(tmp_path / "out")
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)


class StoppedError(Exception):
    pass


def stop_at(stage: str, error: BaseException) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.stage == stage and event.share > 0:
            raise error

    return progress


def test_other_arguments_on_a_half_done_output(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        pocketllm.compress(
            source, tiny.settings(), tmp_path / "out", progress=stop_at("encode", StoppedError())
        )
    before = contents(tmp_path / "out.partial")
    other = tiny.settings(seed=3, codebook_size=64)
    with pytest.raises(ResumeError, match=r"codebook_size: 32 then, 64 now; seed: 0 then, 3 now"):
        pocketllm.compress(source, other, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == before


def test_other_weights_under_the_same_name(source: Path, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense")
    with pytest.raises(StoppedError):
        pocketllm.compress(
            folder, tiny.settings(), tmp_path / "out", progress=stop_at("encode", StoppedError())
        )
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.save_pretrained(folder)
    with pytest.raises(ResumeError, match="weights"):
        pocketllm.compress(folder, tiny.settings(), tmp_path / "out")


def test_interrupted_by_the_user(source: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pocketllm.compress(
            source, tiny.settings(), tmp_path / "out", progress=stop_at("encode", KeyboardInterrupt())
        )
    assert not (tmp_path / "out").exists()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(
    error: Exception, source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = kept.save_file, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        original(*arguments)

    monkeypatch.setattr(kept, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
@pytest.mark.parametrize(
    ("what", "limit", "words"),
    [
        ("compress", 1_000, "File too large"),  # a unit of the work, written by safetensors
        ("compress", 15_000, "File too large"),  # the checkpoint, written by us
        ("export", 15_000, "File too large.*free some space"),
        ("sensitivity", 1_000, "File too large.*POCKETLLM_CACHE"),
    ],
)
def test_a_disk_that_takes_no_more(
    what: str,
    limit: int,
    words: str,
    source: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit stays with the process, so that a copy of this one takes it."""
    import resource

    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    config = tiny.calibrated(tiny.settings())
    jobs: dict[str, Callable[[], object]] = {
        "compress": lambda: pocketllm.compress(source, tiny.settings(), tmp_path / "out"),
        "export": lambda: export(small, tmp_path / "out", torch.float32),
        "sensitivity": lambda: pocketllm.dry_run(source, tiny.calibrated(tiny.settings(seed=1))),
    }
    pocketllm.dry_run(source, config)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        jobs[what]()

    said = raised_in_a_copy(limited)
    assert re.search(f"OutputError: .*{words}", said), said
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "out.partial"}
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_an_error_that_is_not_a_full_disk_is_not_hidden(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(kept, "save_file", broken)
    with pytest.raises(RuntimeError, match="something else"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EACCES, "no permission"), (errno.EIO, "cannot be written")]
)
def test_other_refusals_of_the_system(
    code: int, words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(kept, "save_file", refused)
    with pytest.raises(OutputError, match=words):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")
