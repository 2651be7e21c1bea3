"""Measured values for a model card: from the JSON of `pocketllm eval`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.format import Figure
from pocketllm.report.evaluations import read_json, same_model

_OUTPUT = "the output of 'pocketllm eval --json' on the compressed model"
_ON_TEXT = {  # key of the JSON -> (in words, name of the metric)
    "perplexity": ("perplexity", "perplexity"),
    "kl": ("KL divergence from the dense model, nats per token", "kl_divergence"),
    "top1_agreement": ("top-1 agreement with the dense model", "top1_agreement"),
}
_ON_TASK = {"acc": "accuracy", "acc_norm": "accuracy, normalized"}
logger = logging.getLogger(__name__)


def read_figures(path: Path, folder: Path) -> list[Figure]:
    """The measured values in a file, for the card of the model in a folder.

    Raises:
        SourceError: missing, or not the output of `pocketllm eval --json` on a compressed model.
    """
    values = read_json(path, _OUTPUT)
    if not isinstance(values, dict) or values.get("compressed") is not True or values.get("adapter"):
        raise SourceError(f"{path}: not of a compressed model alone; wanted {_OUTPUT}")
    found = [*_on_text(values), *_on_tasks(values)]
    if not found:
        raise SourceError(f"{path}: no finite value in it; wanted {_OUTPUT}")
    if not same_model(str(values.get("model")), str(folder)):
        logger.warning("%s: was measured on %s; make sure that this is %s", path, values.get("model"), folder)
    return found


def perplexity_figure(text: str, context: int, windows: int, own: float, dense: float | None) -> Figure:
    """A perplexity. text: name of its file."""
    return Figure(
        what=f"perplexity{_setting(text, context, windows)}",
        value=own,
        dense=dense,
        metric="perplexity",
        dataset=Path(text).name,
    )


def _setting(text: str, context: Any, windows: Any) -> str:
    return f" on {Path(text).name}, context {context}, {windows} windows"


def _on_text(values: Mapping[str, Any]) -> Iterator[Figure]:
    text = str(values.get("text"))
    setting = _setting(text, values.get("context"), values.get("windows"))
    for key, (words, metric) in _ON_TEXT.items():
        own, other = _number(values.get(key)), _number(_at(values.get("against"), key))
        if own is not None:
            yield Figure(f"{words}{setting}", own, other, metric, Path(text).name)


def _on_tasks(values: Mapping[str, Any]) -> Iterator[Figure]:
    for task, result in (values.get("tasks") or {}).items():
        limit = f", first {values['limit']}" if values.get("limit") else ""
        for key, words in _ON_TASK.items():
            own = _number(_at(result, key))
            other = _number(_at(_at(_at(values.get("against"), "tasks"), task), key))
            if own is not None:
                yield Figure(f"{task}{limit}, {words}", own, other, key, task)


def _at(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
