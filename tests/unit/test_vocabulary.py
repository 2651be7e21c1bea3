"""Positions and vocabularies: what is refused, and that messages name the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from pocketllm.errors import ConfigError, SourceError
from pocketllm.source.folder import read_vocabulary
from pocketllm.text.vocabulary import (
    Vocabulary,
    check_positions,
    check_vocabularies,
    positions_of,
)
from tests import tiny


def test_positions_of_a_model_without_a_limit() -> None:
    assert positions_of(transformers.XLNetConfig()) is None  # its class says -1


def test_positions_of_a_model_whose_text_part_is_nested() -> None:
    text = tiny.config("gemma3", max_position_embeddings=50)
    config = transformers.Gemma3Config(text_config=text.to_dict())
    assert not hasattr(config, "max_position_embeddings") and positions_of(config) == 50
    check_positions(config, 50, "nested")
    with pytest.raises(ConfigError, match="context: got 51, nested has 50 positions; lower it"):
        check_positions(config, 51, "nested")


def test_a_model_without_a_bound() -> None:
    config = transformers.MambaConfig()
    assert positions_of(config) is None
    check_positions(config, 1 << 30, "mamba")


@pytest.mark.parametrize(
    ("size", "ids", "words"),
    [
        (3, {"a": 0}, "dense has a vocabulary of 3 tokens, own one of 2; name the dense model that own was"),
        (
            2,
            {"a": 1, "b": 0},
            r"dense and own have the same number of tokens, but different ones \('a' is 1 and 0\)",
        ),
        (2, {"a": 0}, r"\('b' is missing and 1\)"),
        (2, {"a": 0, "b": 1, "c": 1}, r"\('c' is 1 and missing\)"),
    ],
)
def test_other_vocabularies(size: int, ids: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_vocabularies(Vocabulary("own", 2, {"a": 0, "b": 1}), Vocabulary("dense", size, ids))


def test_the_same_vocabulary() -> None:
    own = Vocabulary("own", 2, {"a": 0, "b": 1})
    for ids in ({"b": 1, "a": 0}, None):  # without a tokenizer, the size is all that can be compared
        check_vocabularies(own, Vocabulary("dense", 2, ids))


def test_vocabularies_of_folders(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    found = read_vocabulary(folder, "m")
    assert (found.name, found.size, found.ids) == ("m", 96, tiny.tokenizer().get_vocab())
    (folder / "tokenizer.json").write_text("{")
    assert read_vocabulary(folder, "m").ids is None
    (folder / "config.json").write_text("{")
    with pytest.raises(
        SourceError, match=r"m/config\.json: damaged, so that transformers cannot build this model"
    ):
        read_vocabulary(folder, "m")
