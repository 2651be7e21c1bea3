"""Perplexities that belong to a report: from the JSON of `pocketllm eval`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.source import resolve_local

_OUTPUT = "the output of 'pocketllm eval --json'"

Setting = tuple[str, int, int, int]  # text, context, windows, tokens


@dataclass(frozen=True)
class Evaluation:
    """One measured perplexity and what it was measured on. windows, tokens: 0 if unknown."""

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
    def setting(self) -> Setting:
        """Two perplexities may be compared only if this is the same."""
        return Path(self.text).name, self.context, self.windows, self.tokens

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "evaluation") -> Evaluation:
        """From the JSON of `pocketllm eval`; unknown keys are ignored.

        Raises:
            SourceError: a required key is missing, or one is of another type; names it.
        """
        known = {key: values[key] for key in cls.__dataclass_fields__ if values.get(key) is not None}
        for key, (wanted, fits) in _FIELDS.items():
            required = key in ("perplexity", "model", "compressed")
            if (required or key in known) and not fits(known.get(key)):
                got = repr(values.get(key))
                got = got if len(got) <= 60 else f"{got[:60]}…"
                raise SourceError(f"{where}: {key} is {got}, wanted {wanted}, as in {_OUTPUT}")
        return cls(**known)


def _is_perplexity(value: Any) -> bool:
    """Above 0, perhaps not finite; an integer must fit a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return False
    return isinstance(value, float) or value <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    """A string that can be encoded, and be the name of a file: no zero, no half of a pair, which JSON can hold."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


_COUNT = ("an integer of at least 0", _is_count)
_TEXT = ("text", _is_text)
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "perplexity": ("a number above 0", _is_perplexity),
    "model": _TEXT,
    "compressed": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(("text", "dtype", "adapter"), _TEXT),
    **dict.fromkeys(("context", "windows", "tokens", "bytes_on_disk"), _COUNT),
}


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluation in a file, and that of the model it was compared with (`--against`), if there is one.

    Raises:
        SourceError: missing, unreadable, not JSON, or not the output of `pocketllm eval --json`.
    """
    values = read_json(path, _OUTPUT)
    if not isinstance(values, dict):
        raise SourceError(f"{path}: not a JSON object; wanted {_OUTPUT}")
    own = Evaluation.from_dict(values, str(path))
    other = values.get("against")
    if other is not None and not isinstance(other, dict):
        raise SourceError(f"{path}: against is not a JSON object; wanted {_OUTPUT}")
    if other is None or other.get("perplexity") is None:
        return [own]
    inherited = {**values, "dtype": "", "adapter": "", "bytes_on_disk": 0}
    return [own, Evaluation.from_dict({**inherited, **other}, f"{path}: against")]


def read_json(path: Path, wanted: str) -> Any:
    """What a JSON file holds. wanted: what it should be, for the error.

    Raises:
        SourceError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error}); wanted {wanted}") from error


def same_model(one: str, other: str) -> bool:
    """Whether two names are known to be of one model: they are equal, or lead to one place."""
    return one == other or _place(one) == _place(other)


def _place(name: str) -> str:
    try:
        found = resolve_local(name)
    except OSError:  # no name that a folder could have
        found = None
    return os.path.realpath(found or os.path.expanduser(name))
