"""Compressed models in studies: compressed once into the scratch folder, assembled in memory, measured."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.calibrate import fast_dtype
from pocketllm.compression import Event
from pocketllm.config import CompressConfig, EvalConfig, preset
from pocketllm.errors import ConfigError
from pocketllm.evaluate import Subject, evaluate_tasks, local_task_digest, local_task_names
from pocketllm.format import REPORT_NAME, weighted_mean
from pocketllm.runtime import Matrices
from pocketllm.source import load_dense, need_tokenizer, resolve
from pocketllm.studies.definition import Progress, Setup, Text
from pocketllm.studies.measure.task_scores import scores
from pocketllm.text import default_text, positions_of, read_calibration

_STAGES = {"measure": (0.0, 0.2), "fit": (0.2, 0.4), "encode": (0.4, 1.0)}
"""Share of a compression that a stage begins and ends at, roughly: progress only."""


@dataclass(frozen=True)
class Extent:
    """The extent of the measurement: windows of each text, the first `limit` documents of each task."""

    context: int
    windows: int
    limit: int = 0


def compressed(
    setup: Setup, name: str, config: CompressConfig, progress: Progress = lambda share: None
) -> Path:
    """The folder of the model compressed into the scratch folder, now or by an earlier step.

    Raises:
        PocketError: as `pocketllm.compress`.
    """

    def on_event(event: Event) -> None:
        begin, end = _STAGES.get(event.stage, (0.0, 0.0))
        if end:
            progress(begin + (end - begin) * event.share)

    folder = setup.work / name
    if not (folder / REPORT_NAME).is_file():
        pocketllm.compress(setup.model, config, folder, device=setup.device, progress=on_event)
    return folder


def calibration_texts() -> tuple[str, ...]:
    """WikiText-2's train text if `POCKETLLM_DATA` has it; nothing stands for Python's own documentation."""
    folder = data_folder()
    file = folder / "wikitext2" / "wiki.train.first_part.txt" if folder else None
    return (str(file),) if file is not None and file.is_file() else ()


def calibrated(preset_name: str, **changes: Any) -> CompressConfig:
    """A calibrated preset on the texts of this machine. changes: of its calibration, to take less time."""
    config = preset(preset_name)
    assert config.calibration is not None
    return replace(config, calibration=replace(config.calibration, texts=calibration_texts(), **changes))


def inputs(tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """The texts and tasks on this machine that a study can use.

    Returns:
        calibration: name of the text -> digest. tasks, if given: name -> digest of its files.
    """
    texts = [Text(Path(file).name, read_calibration(file)) for file in calibration_texts()]
    texts = texts or [Text("Python's own documentation", default_text())]
    found: dict[str, Any] = {"calibration": {text.name: text.digest for text in texts}}
    if tasks is not None:
        found["tasks"] = {name: local_task_digest(name, data_folder()) for name in tasks}
    return found


def data_folder() -> Path | None:
    """The folder that `POCKETLLM_DATA` names."""
    named = os.environ.get("POCKETLLM_DATA")
    return Path(named) if named else None


def task_names() -> list[str]:
    """The zero-shot tasks that can be read from local files here; none where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        return []
    return local_task_names(data_folder())


def check_texts(setup: Setup, extent: Extent) -> None:
    """Check that every text has enough windows, before the long work.

    Raises:
        SourceError: no tokenizer, or a text cannot be read. ConfigError: a text is too short.
    """
    tokenizer, windows = need_tokenizer(resolve(setup.model)), extent.windows
    wanted = windows * fitting(setup, extent.context)
    for text in setup.evaluation_texts():
        count = len(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])
        if count < wanted:
            raise ConfigError(
                f"{text.name}: has {count} tokens, wanted {wanted} ({windows} windows); name a longer text"
            )


def fitting(setup: Setup, context: int) -> int:
    """The number of tokens, or fewer if the model has fewer positions."""
    return min(context, positions_of(setup.source().model.config) or context)


def dense_model(setup: Setup) -> tuple[Any, Any]:
    """(model, tokenizer): as it is before compression, in the dtype the machine is fastest in."""
    folder = resolve(setup.model)
    model = load_dense(folder, fast_dtype(setup.device))
    return model.to(setup.device).requires_grad_(False), need_tokenizer(folder)


def compressed_model(setup: Setup, folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer): of a compressed folder, in the dtype that `dense_model` has."""
    model, tokenizer = pocketllm.load(folder, dtype=fast_dtype(setup.device))
    return model.to(setup.device), tokenizer


def mean_nmse(report: Mapping[str, Any]) -> float:
    """nmse of a compressed model's matrices, weighted by their sizes; NaN if one is unknown. report: as stored."""
    found = weighted_mean((m["nmse"], math.prod(m["shape"])) for m in report["matrices"])
    return math.nan if found is None else found


@contextmanager
@torch.no_grad()
def installed(model: Any, matrices: Matrices, names: Iterable[str]) -> Iterator[None]:
    """Context in which some of a dense model's matrices are replaced by the compressed ones."""
    before = {name: model.get_parameter(name).clone() for name in names}
    try:
        for name in before:
            model.get_parameter(name).copy_(matrices.read(name))
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).copy_(value)


def task_results(
    model: tuple[Any, Any], names: list[str], limit: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Zero-shot results as `task_scores.scores` keeps them; {} without names. Nothing is kept in the cache.

    Args:
        model: (model, tokenizer). names: as `task_names`. limit: first documents of each task.
    """

    def on_share(task: str, share: float) -> None:
        progress((names.index(task) + share) / len(names))

    if not names:
        return {}
    found = evaluate_tasks(
        names,
        Subject("a study's", "", lambda: model),
        EvalConfig(limit=limit),
        data_folder(),
        hub=False,
        cache=False,
        progress=on_share,
    )
    return scores(found)
