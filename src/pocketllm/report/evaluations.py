"""Perplexities that belong to a report: from the JSON of `pocketllm eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError


@dataclass(frozen=True)
class Evaluation:
    """One measured perplexity and what it was measured on. windows, tokens: 0 where it is not said."""

    perplexity: float
    model: str
    compressed: bool
    text: str = ""
    context: int = 0
    windows: int = 0
    tokens: int = 0
    dtype: str = ""
    bytes_on_disk: int = 0
    adapter: str = ""

    @property
    def setting(self) -> tuple[str, int, int, int]:
        """Two perplexities may be compared only if this is the same."""
        return Path(self.text).name, self.context, self.windows, self.tokens

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "evaluation") -> Evaluation:
        """From the JSON of `pocketllm eval`; keys it does not know are left out.

        Raises:
            SourceError: a key that is needed is missing or of another type.
        """
        types = {"perplexity": (int, float), "model": (str,), "compressed": (bool,)}
        for key, allowed in types.items():
            if not isinstance(values.get(key), allowed):
                raise SourceError(
                    f"{where}: {key} is {values.get(key)!r}; wanted the output of 'pocketllm eval --json'"
                )
        known = {key: values[key] for key in cls.__dataclass_fields__ if values.get(key) is not None}
        return cls(**known)


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluation in a file, and that of the model it was compared with (`--against`), if there is one.

    Raises:
        SourceError: missing, unreadable, no JSON, or not what `pocketllm eval --json` prints.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise SourceError(
            f"{path}: no JSON ({error}); wanted the output of 'pocketllm eval --json'"
        ) from error
    if not isinstance(values, dict):
        raise SourceError(f"{path}: no JSON object; wanted the output of 'pocketllm eval --json'")
    own = Evaluation.from_dict(values, str(path))
    other = values.get("against")
    if not isinstance(other, dict) or other.get("perplexity") is None:
        return [own]
    return [own, Evaluation.from_dict({**values, "dtype": "", **other}, str(path))]
