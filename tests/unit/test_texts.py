"""Calibration text: where it comes from, what is wrong with it, and the windows cut from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm.errors import ExtraError, SourceError
from pocketllm.text.read import calibration_windows, default_text, read_calibration
from tests import tiny


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
    """The field `text` where there is one, else every string, however deep."""
    rows = [{"text": "one", "url": "no"}, {"question": "two", "answers": [{"a": "three", "n": 3}]}, ["four"]]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_calibration(path) == "one\n\ntwothree\n\nfour"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: not UTF-8 \(byte 0\)"),
        ("a.txt", b" \n", r"a\.txt: holds no text"),
        ("a.jsonl", b'{"text": ', r"a\.jsonl: line 1 is not JSON"),
        ("a.jsonl", b"[1, 2]\n{}\n", r"a\.jsonl: holds no text"),
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
        with pytest.raises(SourceError, match=rf"owner/name: neither a local file .* delivers \({reason}\)"):
            read_calibration("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"label": 3}])
    with pytest.raises(SourceError, match="owner/name: holds no text"):
        read_calibration("owner/name")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[hub\]'"):
        read_calibration("owner/name")


def windows(texts: list[str], tokens: int, context: int = 8) -> list[str]:
    """Each window as text; the tokenizer makes a token of every character."""
    tokenizer = tiny.tokenizer()
    found = calibration_windows(tokenizer, texts, tokens, context, seed=0)
    assert found.dtype == torch.int64
    return [tokenizer.decode(window) for window in found]


def test_windows_are_random_pieces_in_order() -> None:
    text = "".join(f"window{n:02d}" for n in range(20))
    found = windows([text], 48)
    assert len(found) == 6 and found == sorted(found) and set(found) <= {f"window{n:02d}" for n in range(20)}
    assert found != [f"window{n:02d}" for n in range(6)]
    assert windows([text], 48) == found
    assert windows([text], 10_000) == [f"window{n:02d}" for n in range(20)]


def test_every_text_gives_alike_and_a_small_one_what_it_has() -> None:
    long, other, short = "a" * 800, "b" * 800, "c" * 17
    assert sorted(windows([long, other], 80)) == ["a" * 8] * 5 + ["b" * 8] * 5
    assert sorted(windows([long, short, other], 80)) == ["a" * 8] * 4 + ["b" * 8] * 4 + ["c" * 8] * 2


def test_texts_shorter_than_a_window_are_joined() -> None:
    assert windows(["abcde", "x" * 16, "fghijkl"], 1000) == ["xxxxxxxx", "xxxxxxxx", "abcdefgh"]
    assert windows(["abc", "de"], 1000) == ["abcde"]  # not one window: a shorter one


@pytest.mark.parametrize("texts", [["a"], ["", ""], []])
def test_no_text_at_all(texts: list[str]) -> None:
    with pytest.raises(SourceError, match=r"the texts have [01] tokens"):
        windows(texts, 100)


def test_the_default_text_does_not_hold_what_is_measured_on() -> None:
    parts = [
        {" ".join(paragraph.split()) for paragraph in default_text(held_out).split("\n\n")}
        for held_out in (False, True)
    ]
    assert len(default_text()) > 300_000 and len(default_text(held_out=True)) > 20_000
    assert not parts[0] & parts[1]
