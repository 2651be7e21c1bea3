"""Runs that were killed at the worst moment, outputs with odd names, streams that take no Unicode."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
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
from pocketllm.format.checkpoint import verify
from pocketllm.format.output import check_output, named_output
from pocketllm.format.workspace import Workspace, remove_published
from pocketllm.report.output_files import check_target
from tests import tiny
from tests.commands import Run, digest

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


def test_outputs_by_other_names(
    source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link is followed, a slash at the end is nothing, `..` is the folder above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place/made")
    for overwrite in (False, True):
        pocketllm.compress(source, tiny.settings(), "link", overwrite=overwrite)
    assert (tmp_path / "link").is_symlink() and digest(tmp_path / "place" / "made") == digest(small)
    pocketllm.compress(source, tiny.settings(), "a/")
    assert digest(tmp_path / "a") == digest(small)
    pocketllm.export(small, Path("b/"), torch.float32)
    with pytest.raises(OutputError, match="exists and is not a compressed model"):
        pocketllm.compress(source, tiny.settings(), "..")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link", "place"]


def test_outputs_that_are_no_place(source: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for output in (loop, tmp_path / ".." / tmp_path.name / "loop"):
        with pytest.raises(OutputError, match="loop: links in a loop; choose another"):
            pocketllm.compress(source, tiny.settings(), output)
    with pytest.raises(OutputError, match=r"cannot be written|links in a loop"):
        pocketllm.compress(source, tiny.settings(), loop / "out")
    for root in ("/", "/."):
        with pytest.raises(OutputError, match="/: is the root folder; choose another output folder"):
            named_output(root)


def test_nothing_is_written_into_a_compressed_model(source: Path, copy: Path) -> None:
    for output in (copy / "out", copy / "a" / "b"):
        with pytest.raises(OutputError, match=f"is inside the compressed model {copy}"):
            pocketllm.compress(source, tiny.settings(), output)
        with pytest.raises(OutputError, match="is inside the compressed model"):
            pocketllm.export(copy, output, torch.float32)
    verify(copy)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_a_working_folder_with_something_that_blocks(source: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    write_json(left / "state.json", {})
    os.mkfifo(left / "lock")
    with pytest.raises(OutputError, match="lock: not a regular file; remove it"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    (left / "lock").unlink()
    (left / "lock").symlink_to(source / "config.json")
    with pytest.raises(OutputError, match="lock: a link that leads out of the folder"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert (source / "config.json").stat().st_size > 0


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


def test_names_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the name has 250 bytes, wanted at most 200; choose a shorter one"):
        pocketllm.compress(source, tiny.settings(), tmp_path / ("x" * 250))
    with pytest.raises(OutputError, match="the name has 250 bytes"):
        check_target(tmp_path / ("x" * 245 + ".html"))
    with pytest.raises(OutputError, match="the name is not UTF-8; choose another"):
        pocketllm.compress(source, tiny.settings(), os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(OutputError, match="the name is not UTF-8"):
        named_output(os.fsdecode(os.fsencode(tmp_path) + b"/\xff/out"))
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / ("x" * 300) / "out")
    assert named_output(tmp_path / "x") == tmp_path / "x"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_the_tokenizer_is_saved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes it has an error of its own for that."""

    def full(*arguments: Any, **keywords: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(OutputError, match="No space left on device"):
        pocketllm.export(small, tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_brackets_in_a_path_are_no_markup(source: Path, tmp_path: Path, run: Run) -> None:
    place = tmp_path / "a[" / "b]"
    place.mkdir(parents=True)
    dense = Path(shutil.copytree(source, place / "dense[red]"))
    code, out, err = run("compress", dense, "-o", place / "out", *SETTINGS)
    assert code == 0, err
    assert "a[/b]" in out + err
    for command in (("info", place / "out"), ("generate", place / "out", "--prompt", "[/b]")):
        code, out, err = run(*command)
        assert code == 0, err


SETTINGS = [
    word
    for setting in ("vector_len=5", "codebook_size=32", "codebook_scope=kind", "codec.epochs=1")
    for word in ("--set", setting)
]


def test_a_stream_that_takes_no_unicode(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.cli.render import Output

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Output(as_json=True).result({"text": "ü → \udcff"})
    Output().result({}, "ü →")
    stream.flush()
    written = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert written.splitlines() == [r'{"text": "\u00fc \u2192 \udcff"}', r"\xfc \u2192"]


@pytest.mark.skipif(sys.platform == "win32", reason="file names are Unicode there")
def test_a_c_locale(small: Path, tmp_path: Path) -> None:
    """Python then decodes names and words of the command line as ASCII, and writes ASCII alone."""
    place = tmp_path / "größe"
    shutil.copytree(small, place / "small")
    calls = [
        ["info", place / "small"],
        ["generate", place / "small", "--prompt", "a"],
        ["generate", small, "--prompt", "größe"],
        ["export", small, "--to", place / "out"],
        ["export", small, "--to", tmp_path / "out"],
    ]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *("|".join(map(str, call)) for call in calls)],
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}, **locale},
        capture_output=True,
        check=False,
    )
    assert done.stderr.isascii() and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == b"[0, 1, 2, 1, 0]", (done.stdout, done.stderr)
    assert done.stderr.count(b"not UTF-8") == 3
    assert (tmp_path / "out" / "config.json").is_file() and not (place / "out").exists()


IN_TURN = """
import sys
from pocketllm import cli

codes = []
for words in sys.argv[1:]:
    sys.argv = ["pocketllm", *words.split("|")]
    try:
        cli.main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code or 0)
print(codes)
"""


def test_what_the_system_refuses_is_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", "x/y")

    monkeypatch.setattr("pocketllm.format.verify", refused)
    code, _, err = run("info", small)
    assert code == 1 and err == "error: [Errno 13] Permission denied: 'x/y'\n"
