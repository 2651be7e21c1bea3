"""The text in a file as a model reads it: what its chat template makes of chats."""

from __future__ import annotations

from pathlib import Path

from pocketllm.source.dense_checkpoint import resolve
from pocketllm.source.folder import read_tokenizer
from pocketllm.text.read import holds_rows, read_text


def text_for(path: str | Path, model: str | Path, trust_remote_code: bool = False) -> str:
    """The text in a file, its chats written by a model's chat template; only for rows is the tokenizer read.

    Args:
        model: local folder, `builtin:NAME` or a Hub id, dense or compressed.

    Raises:
        SourceError: as `read_text` and `read_tokenizer`; or no such model. ExtraError: as `read_text`.
    """
    path = Path(path)
    if not holds_rows(path) or not path.is_file():
        return read_text(path)
    return read_text(path, read_tokenizer(resolve(str(model)), trust_remote_code))
