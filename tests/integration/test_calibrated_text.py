"""Texts of a calibration: too short, missing, too long for the model; tokenizers that cannot read them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pocketllm.errors import SourceError
from pocketllm.format.report_warnings import warnings_of
from tests import tiny
from tests.integration.test_architectures import load, logits
from tests.integration.test_calibrated import compress


def test_little_text_is_told_and_damped(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text("too little text.")
    config = tiny.on_trellis(calibration={"texts": (str(tmp_path / "text.txt"),)})
    with caplog.at_level(logging.WARNING, logger="pocketllm"):
        report = compress(source, config, tmp_path / "out")
    assert "16 tokens are fewer than the widest layer has inputs (52)" in caplog.text
    assert all(m.input_tokens == 16 for m in report.matrices if m.input_tokens is not None)
    (told,) = warnings_of(report.to_dict())
    assert "fewer tokens than inputs in 14 matrices" in told and "16 tokens for 52 inputs" in told
    assert torch.isfinite(logits(load(tmp_path / "out", "dense"))).all()


def test_no_text(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(".")
    config = tiny.on_trellis(calibration={"texts": (str(tmp_path / "text.txt"),)})
    with pytest.raises(SourceError, match="the texts have 1 tokens"):
        compress(source, config, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_context_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", "gpt2", n_positions=16)
    report = compress(source, tiny.on_trellis(), tmp_path / "out")
    assert {m.input_tokens for m in report.matrices} == {512, None}


@pytest.mark.parametrize(
    ("architecture", "files", "words"),
    [
        ("llama", ("tokenizer.json", "tokenizer_config.json"), "tokenizer, which cannot be read"),
        ("gpt2", ("tokenizer.json", "tokenizer_config.json"), "it has no tokens"),
        ("llama", ("tokenizer.json",), "tokenizer cannot be read"),
    ],
)
def test_a_tokenizer_without_its_files(
    architecture: str, files: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    source = tiny.save(tmp_path / "dense", architecture)
    for name in files:
        (source / name).unlink()
    with pytest.raises(SourceError, match=words):
        compress(source, tiny.on_trellis(), tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {}}'])
def test_a_damaged_tokenizer(content: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    (source / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match="tokenizer cannot be read"):
        compress(source, tiny.on_trellis(), tmp_path / "out")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", vocab_size=40)
    with pytest.raises(SourceError, match="embedding has 40 rows"):
        compress(source, tiny.on_trellis(), tmp_path / "out")
