"""Runs that were killed at the worst moment, and what they leave to those that follow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.config import DistillConfig, LoopConfig, LoraTuneConfig
from pocketllm.errors import OutputError, ResumeError
from pocketllm.files import write_json
from pocketllm.format import workspace
from pocketllm.format.workspace import Workspace, remove_published
from tests import tiny
from tests.commands import digest

LOOP = LoopConfig(batch_size=2, eval_every=1)


class KilledError(BaseException):
    """In place of a signal."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """End the process's work at a step of publishing."""

    def arrange(where: str) -> None:
        def killed(*arguments: Any, **keywords: Any) -> None:
            raise KilledError

        if where == "before it is renamed":
            monkeypatch.setattr(workspace, "is_held", killed)
        elif where == "while the rest is removed":
            monkeypatch.setattr(Workspace, "drop", killed)
        else:
            monkeypatch.setattr(workspace, "sync_folder", killed)

    return arrange


WHERE = ["before it is renamed", "after it was renamed", "while the rest is removed"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_compress_killed_while_it_publishes(
    where: str,
    overwrite: bool,
    source: Path,
    small: Path,
    tmp_path: Path,
    kill: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command ends well, with and without --overwrite, and leaves nothing else."""
    if overwrite:
        pocketllm.compress(source, tiny.settings(seed=3), tmp_path / "out")
    kill(where)
    with pytest.raises(KilledError):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=overwrite)
    monkeypatch.undo()
    report = pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=overwrite)
    assert digest(tmp_path / "out") == digest(small)
    assert report.bytes_on_disk == sum(path.stat().st_size for path in small.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_killed_while_the_old_one_is_removed(
    source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left of the old one in the work folder is in nobody's way."""
    pocketllm.compress(source, tiny.settings(seed=3), tmp_path / "out")
    original = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "final":
            raise KilledError
        return original(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    for _ in range(2):
        with pytest.raises(KilledError):
            pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=True)
        shutil.copytree(small, tmp_path / "out")  # as if it was put there again
    monkeypatch.undo()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == digest(small)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", WHERE)
def test_export_and_merge_leave_no_hidden_folder(
    where: str, small: Path, tmp_path: Path, kill: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pocketllm.export(small, tmp_path / "right", torch.float32)
    kill(where)
    with monkeypatch.context() as patch:
        patch.setattr("pocketllm.runtime.export.Workspace.drop", lambda work: None)
        with pytest.raises(KilledError):
            kill(where)
            pocketllm.export(small, tmp_path / "out", torch.float32)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} <= {"right", "out", "out.partial"}
    pocketllm.export(small, tmp_path / "out", torch.float32)
    assert digest(tmp_path / "out") == digest(tmp_path / "right")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "right"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", ["distill", "lora"])
def test_recovery_killed_while_it_publishes(
    where: str,
    method: str,
    source: Path,
    small: Path,
    text: Path,
    tmp_path: Path,
    kill: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def recover(out: Path) -> Any:
        if method == "distill":
            config = DistillConfig(texts=(str(text),), context=16, validation_windows=2, steps=2, loop=LOOP)
            return pocketllm.distill(small, out, config, teacher=str(source))
        pytest.importorskip("peft")
        config = LoraTuneConfig(
            texts=(str(text),), rank=2, alpha=4, steps=2, validation_items=2, context=16, loop=LOOP
        )
        return pocketllm.lora(small, out, config)

    right = recover(tmp_path / "right")
    kill(where)
    with pytest.raises(KilledError):
        recover(tmp_path / "out")
    monkeypatch.undo()
    again = recover(tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "right")
    different = {"output", "seconds"}
    assert {k: v for k, v in vars(again).items() if k not in different} == {
        k: v for k, v in vars(right).items() if k not in different
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log", "right", "right.log"]


def test_merge_killed_before_the_compression_resumes(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of the dense model comes into place with the model."""
    pytest.importorskip("peft")
    config = LoraTuneConfig(
        texts=(str(text),), rank=2, alpha=4, steps=1, validation_items=2, context=16, loop=LOOP
    )
    pocketllm.lora(small, tmp_path / "adapter", config)

    def merge() -> Any:
        return pocketllm.merge(
            small, tmp_path / "adapter", tmp_path / "out", reencode=True, text=text, context=16, windows=2
        )

    def killed(*arguments: Any, **keywords: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "drop", killed)
        with pytest.raises(KilledError):
            merge()
        made = (tmp_path / "out-dense" / "model.safetensors").stat().st_mtime_ns
        assert (tmp_path / "out-dense.partial" / "state.json").is_file()
    assert merge().output == str(tmp_path / "out")
    assert (tmp_path / "out-dense" / "model.safetensors").stat().st_mtime_ns == made
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out-dense"}


def test_compress_and_recover_killed_at_the_very_end(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketllm.recover import compress_then_distill as module

    recovery = DistillConfig(texts=(str(text),), context=16, validation_windows=2, steps=1, loop=LOOP)

    original = shutil.rmtree

    def killed(path: Path, **keywords: Any) -> None:
        if Path(path).name == "out.plain":
            raise KilledError
        original(path, **keywords)

    def killed_at_once(*arguments: Any) -> None:
        raise KilledError

    def run() -> Any:
        return module.compress_and_distill(str(source), tiny.settings(), recovery, tmp_path / "out")

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "drop", killed_at_once)
        with pytest.raises(KilledError):  # the model before recovery is published
            run()
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            run()
    (tmp_path / "out.partial").mkdir()
    report, done = run()
    assert done.steps == 1 and report.bytes_on_disk > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log"]
    (tmp_path / "out.plain").mkdir()
    (tmp_path / "out.log" / "summary.json").write_text("[]")
    with pytest.raises(ResumeError, match=r"summary\.json: damaged"):
        module.compress_and_distill(str(source), tiny.settings(), recovery, tmp_path / "out")


def test_a_flipped_bit_in_a_finished_unit(source: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if event.stage == "write":
            raise KilledError

    with pytest.raises(KilledError):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out", progress=stop)
    for unit in ("matrix-00003.safetensors", "codebook-00000.safetensors"):
        path = tmp_path / "out.partial" / unit
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
        with pytest.raises(ResumeError, match=f"{unit}: damaged .*altered.*; delete"):
            pocketllm.compress(source, tiny.settings(), tmp_path / "out")
        path.write_bytes(data)


def test_the_current_folder_as_output(
    source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: Callable[[str], None]
) -> None:
    """It is filled, since it cannot be replaced."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with monkeypatch.context() as patch:
        seen: list[str] = []
        original = Path.replace

        def killed(path: Path, target: Path) -> Path:
            if "final" in path.parts:
                seen.append(path.name)
                if len(seen) == 3:
                    raise KilledError
            return original(path, target)

        patch.setattr(Path, "replace", killed)
        with pytest.raises(KilledError):
            pocketllm.compress(source, tiny.settings(), ".")
    assert list(Path.cwd().iterdir()) and not (tmp_path / "out" / "pocketllm.json").exists()
    pocketllm.compress(source, tiny.settings(), ".")
    assert Path.cwd() == tmp_path / "out" and digest(Path.cwd()) == digest(small)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="is the current folder or a mounted one"):
        pocketllm.compress(source, tiny.settings(), ".", overwrite=True)
    pocketllm.load(".")


def test_killed_when_all_but_the_empty_folder_was_removed(source: Path, copy: Path) -> None:
    left = copy.with_name(f"{copy.name}.partial")
    left.mkdir()
    with pytest.raises(OutputError, match="already exists"):
        pocketllm.compress(source, tiny.settings(), copy)
    assert not left.exists()


def test_what_a_killed_run_left_of_a_stage(tmp_path: Path) -> None:
    output, left = tmp_path / "out", tmp_path / "out.partial"
    left.mkdir()
    remove_published(output)
    assert left.is_dir()  # there is no output yet
    output.mkdir()
    remove_published(output)
    assert not left.exists()
    (output / "config.json").write_text("{}")
    left.mkdir()
    write_json(left / "state.json", {"published": {"config.json": 3}})
    (left / "unit.safetensors").touch()
    remove_published(output)
    assert left.is_dir()  # of another output
    write_json(left / "state.json", {"published": {"config.json": 2}})
    with workspace.locked(left), pytest.raises(OutputError, match="in use by another process"):
        remove_published(output)
    (left / "final").mkdir()
    remove_published(output)
    assert left.is_dir()  # not published yet
    (left / "final").rmdir()
    remove_published(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stage_whose_rest_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workspace, "is_published", refused)
    with pytest.raises(OutputError, match="out: no permission to write"):
        remove_published(tmp_path / "out")
