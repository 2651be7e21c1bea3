"""Reading text: files, folders, data sets of the hub, instructions; what is wrong with them is said."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketllm.errors import ExtraError, SourceError
from pocketllm.text.default_texts import default_text
from pocketllm.text.instructions import prompt_of
from pocketllm.text.read import read_answered, read_calibration, read_text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "ignored.py", "third")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.raw", "fourth")
    assert read_calibration(tmp_path / "a.txt") == "first"
    assert read_calibration(tmp_path) == "first\n\nsecond\n\nfourth"


def test_json_lines(tmp_path: Path) -> None:
    """The field `text` where there is one, strings, and lists of them; nothing of rows without strings."""
    rows = [{"text": "one", "url": "no"}, "two", ["three", "four"], 5]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_calibration(path) == "one\n\ntwo\n\nthree\n\nfour\n\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\x00", r"a\.txt: not UTF-8 \(byte 0\) on line 1"),
        ("a.txt", b"one\ntw\xf6", r"a\.txt: not UTF-8 \(byte 6\) on line 2; convert it"),
        ("a.txt", b"\xff\xfea\x00\n\x00\x00", r"a\.txt: not UTF-16 \(byte 6\) on line 2"),
        (
            "a.txt",
            "a\nb".encode("utf-16-le"),
            r"a\.txt: contains NUL bytes on line 1: .* without a byte order",
        ),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be read \(Not a gzipped file"),
        (
            "a.txt.gz",
            gzip.compress(b"some text" * 99, mtime=0)[:30],
            r"a\.txt\.gz: cannot be read \(Compressed file ended",
        ),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read as parquet"),
        ("a.jsonl", b'"one"\n' + b"[" * 100_000, r"a\.jsonl: line 2 is not JSON"),
        ("a.txt", b" \n", r"a\.txt: contains no text"),
        ("a.jsonl", b'{"text": ', r"a\.jsonl: line 1 is not JSON"),
        ("a.jsonl", b"[1, 2]\n{}\n", r"a\.jsonl: contains no text"),
        ("config.json", b'{"a": "b"}', r"config\.json: wanted a list of rows; .* move the file out of"),
    ],
)
def test_unusable_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(SourceError, match=words):
            read_calibration(place)


def test_missing_files_and_folders_without_text(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", "nothing.txt", "texts/train.txt"):
        with pytest.raises(SourceError, match="no such file"):
            read_calibration(place)
    write(tmp_path / "code.py", "pass")
    with pytest.raises(SourceError, match=r"no \*\.txt, .* file in this folder"):
        read_calibration(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that delivers endless rows, and notes what was asked of it."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield {"id": f"row {number}", "text": f"text {number}."}
            number += 1

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_data_sets_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    text = read_calibration("owner/name", characters=30)
    assert text == "text 0.\n\ntext 1.\n\ntext 2.\n\ntext 3.\n\ntext 4."
    read_calibration("owner/name:config", characters=1)
    read_calibration("owner/name:config:validation", characters=1)
    read_calibration("owner/name::validation", characters=1)
    assert hub == [
        ("owner/name", None, "train", True),
        ("owner/name", "config", "train", True),
        ("owner/name", "config", "validation", True),
        ("owner/name", None, "validation", True),
    ]


def test_what_lies_here_comes_before_the_hub(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", "mine")
    monkeypatch.chdir(tmp_path)
    assert read_calibration("owner/name") == "mine" and not hub


def test_a_hub_that_does_not_deliver(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def failing(error: Exception) -> Callable[..., Any]:
        def load(*arguments: Any, **keywords: Any) -> Any:
            raise error

        return load

    for error in (
        ConnectionError("offline\nmore"),
        FileNotFoundError("doesn't exist"),
        ValueError("no split"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", failing(error))
        reason = str(error).splitlines()[0]
        with pytest.raises(SourceError, match=rf"owner/name: neither a local file .* provides \({reason}\)"):
            read_calibration("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"label": 3}])
    with pytest.raises(SourceError, match="owner/name: contains no text"):
        read_calibration("owner/name")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[hub\]'"):
        read_calibration("owner/name")


def test_text_files(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("gr\u00fc\u00dfe\n", encoding="utf-8")
    assert read_text(good) == "gr\u00fc\u00dfe\n"
    with pytest.raises(SourceError, match="no such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="a folder"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes("gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(SourceError, match=r"not UTF-8 \(byte 2\)"):
        read_text(tmp_path / "latin")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(SourceError, match="contains no text"):
        read_text(tmp_path / "empty")


@pytest.mark.skipif(sys.platform == "win32", reason="needs devices and FIFOs")
def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    for read in (read_text, read_calibration):
        with pytest.raises(SourceError, match="/dev/zero: a device; wanted a text file"):
            read("/dev/zero")
    for name in ("a.txt", "b.parquet"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(SourceError, match=f"{name}: a device"):
            read_calibration(tmp_path / name)
        with pytest.raises(SourceError, match=f"{name}: not a regular file; move it out of the folder"):
            read_calibration(tmp_path)
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(SourceError, match=r"c\.txt: not a regular file"):
        read_calibration(tmp_path)
    writer = threading.Thread(target=(tmp_path / "c.txt").write_text, args=("as of <(command)",))
    writer.start()
    assert read_text(tmp_path / "c.txt") == "as of <(command)"
    writer.join()
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "d.txt" / "e.txt").write_text("a text")
    assert read_calibration(tmp_path) == "a text"


def test_unreadable_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(SourceError, match="Permission denied"):
        read_text(tmp_path / "secret")


def test_alpaca_prompt() -> None:
    with_input = prompt_of({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert with_input is not None
    assert with_input[0].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert with_input[1] == "3"
    without = prompt_of({"instruction": "Hi", "input": "", "output": "Ho"})
    assert without is not None
    assert "### Input" not in without[0]
    assert "paired" not in without[0]
    assert prompt_of({"text": "no instruction"}) is None


def pairs(path: Path) -> list[Any]:
    found = read_answered(path)
    assert not isinstance(found, str)
    return [chat.plain for chat in found]


def test_instructions_are_recognized(tmp_path: Path) -> None:
    lines, mixed, text, broken = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.json"))
    lines.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    assert pairs(lines) == [("p", "r")]
    mixed.write_text(lines.read_text() + '{"text": "x"}\n')
    with pytest.raises(SourceError, match="row 2 is not an instruction"):
        read_answered(mixed)
    text.write_text('{"text": "x"}\n')
    assert read_answered(text) == "x"
    for row in ({"instruction": "a", "output": None}, {"prompt": ["p"], "response": "r"}):
        broken.write_text(json.dumps([row] * 2))  # not one is valid: no reason to read them as plain text
        with pytest.raises(
            SourceError, match=r"row 1 is not an instruction; wanted .* as strings in every row"
        ):
            read_answered(broken)
    broken.write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        read_answered(broken)
    broken.write_text("3")
    with pytest.raises(SourceError, match="wanted a list"):
        read_answered(broken)


def test_the_default_text_does_not_hold_what_is_measured_on() -> None:
    parts = [
        {" ".join(paragraph.split()) for paragraph in default_text(held_out).split("\n\n")}
        for held_out in (False, True)
    ]
    assert len(default_text()) > 300_000 and len(default_text(held_out=True)) > 20_000
    assert not parts[0] & parts[1]
