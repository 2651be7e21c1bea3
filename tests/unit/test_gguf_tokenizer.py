"""Tokenizers of GGUF files split text as their models learned it, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketllm.errors import SourceError
from pocketllm.source import need_tokenizer, resolve
from tests import gguf_files, tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def dense() -> Any:
    return gguf_files.model()


def pieces(file: Path, text: str) -> list[str]:
    """A text as tokens, by the tokenizer of the converted file."""
    tokenizer = need_tokenizer(resolve(str(file)))
    found: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("gpt-2", ["Ġ", "Ġ1", "2"]),
        ("smollm", ["Ġ", "Ġ", "1", "2"]),
        ("falcon", ["Ġ", "Ġ1", "2"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2"]),
        ("stablelm2", ["Ġ", "Ġ", "1", "2"]),
    ],
)
def test_digits_after_spaces(
    pre: str, split: list[str], dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "TOKENS", [*gguf_files.TOKENS[:-1], "Ġ1"])
    monkeypatch.setattr(gguf_files, "MERGES", ["Ġ 1"])
    assert pieces(gguf_files.write(tmp_path / "m.gguf", dense, pre=pre), "  12") == split


def test_a_word_that_is_a_token_stays_one(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's tokenizer ignores merges for such a word, and begins a text with BOS."""
    monkeypatch.setattr(gguf_files, "MERGES", ["c d"])
    monkeypatch.setattr(gguf_files, "TOKENS", [*gguf_files.TOKENS[:-2], "cd", "ab"])
    file = gguf_files.write(tmp_path / "m.gguf", dense, pre="llama-bpe")
    assert pieces(file, "ab") == ["ab"]
    tokenizer = need_tokenizer(resolve(str(file)))
    assert tokenizer("ab")["input_ids"][0] == 0
    assert len(tokenizer) == len(gguf_files.TOKENS)
    assert pieces(gguf_files.write(tmp_path / "n.gguf", dense), "ab") == ["a", "b"]


@pytest.mark.parametrize("pre", ["nonsense", "deepseek-llm", None])
def test_a_way_to_split_that_is_not_known(pre: str | None, dense: Any, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", dense, pre=pre)
    with pytest.raises(
        SourceError, match=rf"m\.gguf: .*tokenizer\.ggml\.pre '{pre}'.*put the model's tokenizer"
    ):
        resolve(str(file))


def test_a_tokenizer_of_another_model_beside_the_file(dense: Any, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    file = gguf_files.write(tmp_path / "m.gguf", dense)
    with pytest.raises(SourceError, match=r"m\.gguf: .*tokenizer\.json.* next to it belong to another model"):
        resolve(str(file))


def test_the_model_s_own_tokenizer_beside_the_file(dense: Any, tmp_path: Path) -> None:
    made = resolve(str(gguf_files.write(tmp_path / "m.gguf", dense)))
    (tmp_path / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((made / "tokenizer_config.json").read_bytes())
    again = resolve(str(gguf_files.write(tmp_path / "m.gguf", dense, pre="nonsense")))
    assert (
        json.loads((again / "tokenizer.json").read_text())["model"]
        == (json.loads((made / "tokenizer.json").read_text())["model"])
    )
