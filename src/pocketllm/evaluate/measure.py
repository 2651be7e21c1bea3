"""Everything that `pocketllm eval` measures of a model, alone or against another one, as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.config import EvalConfig
from pocketllm.evaluate.kl import Divergence, text_divergence
from pocketllm.evaluate.paired_accuracy import average, compare
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.evaluate.results import folder_digest
from pocketllm.evaluate.tasks import Subject, TaskSource, find_tasks, run_tasks
from pocketllm.evaluate.verify import verify_compressed
from pocketllm.format.checkpoint import REPORT_NAME, folder_bytes
from pocketllm.source.folder import read_vocabulary
from pocketllm.source.model_files import need_config
from pocketllm.text.vocabulary import Vocabulary, check_vocabularies
from pocketllm.torch_state import in_default_torch_state

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Adapter:
    """An adapter to measure a compressed model with. attach: puts it into the loaded model."""

    folder: Path
    attach: Callable[[Any], None]


class Model:
    """A model to measure; loaded when it is first needed, and then verified if it is a compressed one.

    Args:
        name: as shown to the user.
        folder: holds its files.
        setting: dtype, mode and device, as part of the identity of its results.
        load: returns (model, tokenizer).
        adapter: attached after the model is verified; its bytes are counted.
        trust_remote_code: run code that ships with the model when its vocabulary is read.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        setting: str,
        load: Callable[[], tuple[Any, Any]],
        adapter: Adapter | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self.folder, self.setting, self.adapter = name, folder, setting, adapter
        self.trust_remote_code = trust_remote_code
        self._load = load
        self._loaded: tuple[Any, Any] | None = None
        self._matrices: int | None = None

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer), the same each time.

        Raises:
            LoadError: its folder is that of a compressed model, but it is not compressed in memory.
        """
        if self._loaded is None:
            model, tokenizer = self._load()
            self._matrices = verify_compressed(model) if self.is_compressed() else None
            if self.adapter is not None:
                self.adapter.attach(model)
            self._loaded = model, tokenizer
        return self._loaded

    def is_compressed(self) -> bool:
        """Whether its folder is that of a compressed model."""
        return (self.folder / REPORT_NAME).is_file()

    def described(self) -> dict[str, Any]:
        """Description of what is measured.

        Returns:
            model, adapter, compressed, matrices (number verified in memory; None if dense), adapter_bytes,
            bytes_on_disk (model and adapter).

        Raises:
            SourceError: its folder is not that of a model.
        """
        need_config(self.folder)
        if self.is_compressed():
            self.load()  # so that the number is that of verified layers
        added = 0 if self.adapter is None else folder_bytes(self.adapter.folder)
        return {
            "model": self.name,
            "adapter": None if self.adapter is None else str(self.adapter.folder),
            "compressed": self.is_compressed(),
            "matrices": self._matrices,
            "adapter_bytes": added,
            "bytes_on_disk": folder_bytes(self.folder) + added,
        }

    def vocabulary(self) -> Vocabulary:
        """Its vocabulary, without loading its weights.

        Raises:
            SourceError: its configuration cannot be read.
        """
        return read_vocabulary(self.folder, self.name, self.trust_remote_code)

    def identity(self) -> str:
        """Identity of model and adapter: changes with any bit of them."""
        own = folder_digest(self.folder)
        return own if self.adapter is None else f"{own}+{folder_digest(self.adapter.folder)}"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks to run, and on which data.

    names: of the tasks. data: folder with local files. hub: use it for tasks that `data` lacks.
    cache: use earlier results, and store new ones.
    """

    names: tuple[str, ...]
    data: Path | None = None
    hub: bool = True
    cache: bool = True


@in_default_torch_state
def measure(
    own: Model,
    other: Model | None,
    texts: Mapping[str, str] | None,
    tasks: TaskOptions | None,
    config: EvalConfig,
    progress: Progress = lambda stage, share: None,
) -> dict[str, Any]:
    """Measure a model; the result always has every key, with None for what was not requested.

    Tasks, their data and the vocabularies are checked before anything is measured.

    Args:
        other: model to compare with, usually the dense one.
        texts: for perplexity and, with `other`, divergence, by name.

    Returns:
        model, adapter, compressed, matrices, adapter_bytes, bytes_on_disk; perplexity, context, windows,
        tokens; kl, kl_stderr, top1_agreement, top1_agreement_stderr; tasks, average, limit; against: the same
        of `other`; difference: as `compare`. text: name of the text; None with several, where perplexity, kl and
        top1_agreement are means over texts (of perplexity the geometric one). texts: what was measured on each.

    Raises:
        ConfigError: vocabularies that differ, or windows that do not fit.
        ConfigError, ExtraError, SourceError: as `find_tasks`.
        LoadError: a compressed model is not compressed in memory.
        WeightError: a model's logits are not finite.
    """
    sources = None if tasks is None else find_tasks(tasks.names, tasks.data, tasks.hub)
    cache = tasks is not None and tasks.cache
    values = own.described()
    if other is not None:
        check_vocabularies(own.vocabulary(), other.vocabulary())
    values |= _on_texts(own, other, texts or {}, config, progress)
    reference = values.pop("reference_perplexity")
    models = [model for model in (own, other) if model is not None]
    results = [_on_tasks(model, sources, config, cache, progress) for model in models]
    values |= _shown(results[0]) | {"limit": config.limit, "against": None, "difference": None}
    if other is not None:
        values["against"] = {**other.described(), "perplexity": reference, **_shown(results[1])}
        if results[0] is not None and results[1] is not None:
            values["difference"] = compare(results[0], results[1])
    return values


def _on_texts(
    own: Model, other: Model | None, texts: Mapping[str, str], config: EvalConfig, progress: Progress
) -> dict[str, Any]:
    unknown = dict.fromkeys(["text", *(field.name for field in dataclasses.fields(Divergence))])
    found = []
    for number, (name, text) in enumerate(texts.items()):

        def on_progress(share: float, done: int = number) -> None:
            progress("text", (done + share) / len(texts))

        found.append(unknown | {"text": name} | _on_text(own, other, text, config, on_progress))
    values = unknown if not found else found[0] if len(found) == 1 else unknown | _mean(found)
    return values | {"texts": found}


def _on_text(
    own: Model, other: Model | None, text: str, config: EvalConfig, progress: Callable[[float], None]
) -> dict[str, Any]:
    model, tokenizer = own.load()
    found: Any
    how: dict[str, Any] = {"context": config.context, "windows": config.windows, "progress": progress}
    if other is None:
        found = perplexity(model, tokenizer, text, **how)
    else:
        found = text_divergence(model, other.load()[0], tokenizer, text, **how)
    return dataclasses.asdict(found)


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over texts, each of which counts equally; its standard error from those of the texts."""
    count = len(found)

    def column(name: str) -> list[Any] | None:
        values = [each[name] for each in found]
        return None if None in values else values

    mean: dict[str, Any] = {"context": found[0]["context"]}
    mean |= {name: sum(column(name) or ()) for name in ("windows", "tokens")}
    for name in ("perplexity", "reference_perplexity"):
        values = column(name)
        mean[name] = values and math.exp(sum(map(math.log, values)) / count)
    for name in ("kl", "top1_agreement"):
        values, errors = column(name), column(f"{name}_stderr")
        mean[name] = values and sum(values) / count
        mean[f"{name}_stderr"] = errors and math.hypot(*errors) / count
    return mean


def _on_tasks(
    model: Model, sources: list[TaskSource] | None, config: EvalConfig, cache: bool, progress: Progress
) -> Any:
    if sources is None:
        return None
    return run_tasks(
        sources,
        Subject(fingerprint=model.identity(), setting=model.setting, load=model.load),
        config,
        cache=cache,
        progress=lambda task, share: progress(f"{task}, {model.name}", share),
    )


def _shown(results: Any) -> dict[str, Any]:
    if results is None:
        return {"tasks": None, "average": None}
    return {"tasks": {name: r.to_dict() for name, r in results.items()}, "average": average(results)}
