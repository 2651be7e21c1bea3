"""Windows of tokens: for evaluation, for calibration, and for training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pocketllm.errors import ConfigError, SourceError
from pocketllm.text.read import read_calibration
from pocketllm.text.windows import calibration_windows, read_windows, split_windows, token_windows
from tests import tiny

TEXT = "Some text, long enough to fill a few windows of tokens; and then some more of it. " * 3


@pytest.mark.parametrize(("context", "count"), [(1, None), (20, 0), (20, 10_000), (10_000, None)])
def test_impossible_windows(context: int, count: int | None) -> None:
    with pytest.raises(ConfigError, match=r"context|windows"):
        token_windows(tiny.tokenizer(), TEXT, context, count)


def windows(texts: list[str], tokens: int, context: int = 8) -> list[str]:
    """Each window as text; the tokenizer makes a token of every character."""
    tokenizer = tiny.tokenizer()
    found, counts = calibration_windows(tokenizer, texts, tokens, context, seed=0)
    ids = torch.cat([torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    assert torch.equal(counts, torch.bincount(ids))
    assert found.dtype == torch.int64
    return [tokenizer.decode(window) for window in found]


def test_windows_are_random_pieces_in_order() -> None:
    text = "".join(f"window{n:02d}" for n in range(20))
    found = windows([text], 48)
    assert len(found) == 6 and found == sorted(found) and set(found) <= {f"window{n:02d}" for n in range(20)}
    assert found != [f"window{n:02d}" for n in range(6)]
    assert windows([text], 48) == found
    assert windows([text], 10_000) == [f"window{n:02d}" for n in range(20)]


def test_texts_contribute_equally_and_a_small_one_what_it_has() -> None:
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


def test_texts_are_read_by_their_form(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "abcd", "response": "ef"}] * 2))
    windows = read_windows(tokenizer, (str(tmp_path / "a.json"),), 3)
    assert "".join(tokenizer.batch_decode(windows)) == "abcdef<unk><unk>abcd"
    plain = tmp_path / "plain.json"  # its strings, not its brackets
    plain.write_text(json.dumps([{"text": "abc", "n": 1}, "de"]))
    assert read_calibration(plain) == "abc\n\nde"
    plain.write_text(json.dumps({"text": ["abc", "de"]}))
    with pytest.raises(SourceError, match="wanted a list of rows"):
        read_calibration(plain)
    plain.unlink()
    (tmp_path / "b.md").write_text("xy")  # too short by itself, but not with its neighbour
    assert len(read_windows(tokenizer, (str(tmp_path),), 18)) == 1
    with pytest.raises(ConfigError, match=r"the text \(.*\) has 18 tokens, less than one window of 19"):
        read_windows(tokenizer, (str(tmp_path),), 19)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no \*\.txt, .* file in this folder"):
        read_windows(tokenizer, (str(tmp_path / "empty"),), 3)
    assert len(read_windows(tokenizer, (), 512)) > 100


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abcdef" * 10)
    monkeypatch.chdir(tmp_path)
    for text in ("", " "):
        with pytest.raises(SourceError, match="got an empty name"):
            read_windows(tiny.tokenizer(), (text,), 3)


def test_split_keeps_windows_apart() -> None:
    windows = torch.arange(60).reshape(30, 2)
    train, validation = split_windows(windows, 16, seed=0)
    assert (len(train), len(validation)) == (27, 3)
    assert torch.equal(torch.cat([train, validation]).sort(0).values, windows)
    assert len(split_windows(windows[:2], 16, seed=0)[1]) == 1
    with pytest.raises(ConfigError, match="wanted at least two"):
        split_windows(windows[:1], 16, seed=0)
