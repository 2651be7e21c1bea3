"""Texts that a model writes itself: the same each time, resumed, and fit to calibrate on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm.config import SampleConfig
from pocketllm.errors import ConfigError, OutputError
from pocketllm.evaluate import sample_texts
from tests import tiny
from tests.commands import Run

SHORT = SampleConfig(tokens=100, length=20, batch=2)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_the_same_texts_each_time_and_after_an_interruption(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    shares: list[float] = []
    whole, broken = tmp_path / "a" / "whole.jsonl", tmp_path / "broken.jsonl"
    assert sample_texts(model, tokenizer, whole, SHORT, on_progress=shares.append) == 5
    texts = [json.loads(line)["text"] for line in lines(whole)]
    assert len(set(texts)) == 5
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == 60

    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_texts(model, tokenizer, broken, SHORT, on_progress=stop)
    (kept,) = tmp_path.glob(".broken.jsonl.*.partial")
    assert lines(kept) == lines(whole)[:2] and not broken.exists()
    kept.write_bytes(b"".join(lines(whole)[:3]) + b'{"te')  # as a kill leaves it
    shares.clear()
    sample_texts(model, tokenizer, broken, SHORT, on_progress=shares.append)
    assert broken.read_bytes() == whole.read_bytes() and shares[0] > 0.4
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["broken.jsonl"]


def test_what_another_model_or_setting_wrote_is_not_continued(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    for number, (config, identity) in enumerate(
        [(SHORT, ""), (replace(SHORT, seed=1), ""), (SHORT, "other")]
    ):
        with pytest.raises(KeyboardInterrupt):
            sample_texts(model, tokenizer, tmp_path / "t", config, identity, stop)
        assert len(list(tmp_path.iterdir())) == number + 1


def test_bad_requests(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokens", "length", "batch"):
        with pytest.raises(ConfigError, match=f"{name}: got 0, wanted at least 1"):
            SampleConfig(**{name: 0})
    with pytest.raises(ConfigError, match="temperature: got 0"):
        SampleConfig(temperature=0)
    with pytest.raises(ConfigError, match="seed: got -1"):
        SampleConfig(seed=-1)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(OutputError, match="taken: exists; choose another name, or --overwrite"):
        sample_texts(model, tokenizer, taken, SHORT)
    with pytest.raises(OutputError, match="is a file, wanted a folder"):
        sample_texts(model, tokenizer, taken / "below", SHORT)
    sample_texts(model, tokenizer, taken, SHORT, overwrite=True)
    assert len(lines(taken)) == 5
    monkeypatch.setattr(Path, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="No space left"):
        sample_texts(model, tokenizer, tmp_path / "t", SHORT)
    bare = tiny.tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ConfigError, match="no token that begins or ends a text"):
        sample_texts(model, bare, tmp_path / "u", SHORT)


def test_the_command_writes_a_text_to_calibrate_on(source: Path, tmp_path: Path, run: Run) -> None:
    asked = ["--tokens", "600", "--length", "60", "--batch", "10", "--dtype", "float32"]
    said = run.json("sample", source, "-o", tmp_path / "own.jsonl", *asked)
    assert (said["texts"], said["tokens"], said["output"]) == (10, 600, str(tmp_path / "own.jsonl"))
    config = tiny.on_trellis(calibration={"texts": (str(tmp_path / "own.jsonl"),), "tokens": 256})
    assert pocketllm.compress(source, config, tmp_path / "out").bytes_on_disk
    code, _, err = run("sample", source, "-o", tmp_path / "own.jsonl", *asked)
    assert code == 1 and "own.jsonl: exists" in err
    assert run("sample", source)[0] == 2
