"""Outputs at odd places and with odd names, streams that take no Unicode, systems that refuse."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.errors import OutputError
from pocketllm.files import write_json
from pocketllm.format.checkpoint import verify
from pocketllm.format.output import check_output, named_output
from pocketllm.format.output_file import check_target
from tests import tiny
from tests.commands import Run, digest


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
