"""Zero-shot tasks through lm-eval: by its names from the hub, or from local files with the same prompts.

Results are cached per task, so that an interrupted evaluation resumes, and hold the score of every document, so that
two models are compared document by document: the standard error of their difference is then much smaller than that
of either.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pocketllm.config import EvalConfig
from pocketllm.errors import ConfigError, ExtraError, SourceError
from pocketllm.evaluate import results
from pocketllm.evaluate.local_tasks import LocalTask, local_task_names, local_tasks, prepare
from pocketllm.torch_state import in_default_torch_state

PAPER_TASKS = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
"""The tasks whose mean accuracy the paper reports (arXiv 2511.17637, zero-shot results)."""
_ALIASES = {"lambada": "lambada_openai"}
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskResult:
    """Result of one task. acc_norm: accuracy when the answer is chosen by likelihood per character.

    *_stderr: standard errors over documents. n: documents scored. limit: as requested, None means all.
    chance: accuracy of guessing. split, data: what was read. seconds: duration of the measurement.
    versions: of lm-eval, its task, torch and transformers. truncated: requests that lost their beginning to the
    limit on prompts. other: further metrics, {name: {value, stderr}}. scores: one per document, by metric.
    cached: taken from the cache.
    """

    task: str
    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    n: int
    limit: int | None
    chance: float | None
    split: str
    data: str
    seconds: float
    versions: dict[str, Any]
    truncated: int
    other: dict[str, dict[str, float | None]]
    scores: dict[str, list[float]]
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the scores of documents."""
        values = asdict(self)
        del values["scores"]
        return values


@dataclass(frozen=True)
class TaskSource:
    """A task to run. rows: identity of its data. load: returns lm-eval's task."""

    name: str
    split: str
    data: str
    rows: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """The model that tasks are run on. fingerprint: identity of its files. setting: what else its scores depend on.

    load: returns (model, tokenizer); called only if something has to be measured.
    """

    fingerprint: str
    setting: str
    load: Callable[[], tuple[Any, Any]]


def check_installed() -> None:
    """Raises ExtraError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ExtraError("tasks need lm-eval, which is not installed: pip install 'pocketllm-codec[eval]'")


def task_names(wanted: Iterable[str], data: Path | None) -> list[str]:
    """The names requested, without repetition; `paper` stands for the paper's five, `local` for all in `data`.

    Raises:
        ConfigError: no task at all.
    """
    names: list[str] = []
    for name in wanted:
        if name == "paper":
            names += PAPER_TASKS
        elif name == "local":
            names += local_task_names(data)
        else:
            names.append(_ALIASES.get(name, name))
    if not names:
        files = ", ".join(task.files[0][0] for task in local_tasks().values())
        where = data or "no folder: neither --data nor POCKETLLM_DATA names one"
        raise ConfigError(f"no task to run in {where}; looked for files such as {files}")
    return list(dict.fromkeys(names))


def find_tasks(names: Iterable[str], data: Path | None, hub: bool = True) -> list[TaskSource]:
    """Find the tasks of these names and their data; nothing is run.

    Args:
        names: as returned by `task_names`; a group of lm-eval's stands for its members.
        data: folder with local files.
        hub: whether to use the hub for tasks that `data` lacks.

    Raises:
        ExtraError: lm-eval is not installed.
        ConfigError: a name is unknown.
        SourceError: data is missing or malformed.
    """
    check_installed()
    return [source for name in names for source in _sources(name, data, hub)]


def evaluate_tasks(
    names: Sequence[str],
    subject: Subject,
    config: EvalConfig,
    data: Path | None = None,
    *,
    hub: bool = True,
    cache: bool = True,
    progress: Callable[[str, float], None] = lambda task, share: None,
) -> dict[str, TaskResult]:
    """`find_tasks`, then `run_tasks`: the data of every task is checked before the first one runs."""
    return run_tasks(find_tasks(names, data, hub), subject, config, cache=cache, progress=progress)


@in_default_torch_state
def run_tasks(
    sources: Iterable[TaskSource],
    subject: Subject,
    config: EvalConfig,
    *,
    cache: bool = True,
    progress: Callable[[str, float], None] = lambda task, share: None,
) -> dict[str, TaskResult]:
    """Measure a model on tasks; each result is cached as soon as it is complete.

    Args:
        cache: use earlier results, and store new ones.
        progress: called with a task's name and its finished share.

    Raises:
        WeightError: the model's logits are not finite; nothing of that task is cached.
    """
    found: dict[str, TaskResult] = {}
    for source in sources:
        identity = _identity(source, subject, config)
        kept = _kept(identity) if cache else None
        if kept is not None:
            found[source.name] = kept
            progress(source.name, 1.0)
            continue
        found[source.name] = _measure(source, subject, config, partial(progress, source.name))
        if cache:
            results.keep(identity, asdict(found[source.name]))
    return found


def _kept(identity: dict[str, Any]) -> TaskResult | None:
    """The cached result for this identity, if there is a valid one."""
    kept = results.recall(identity)
    try:
        return None if kept is None else replace(TaskResult(**kept), cached=True)
    except TypeError:  # a field is missing or unknown: measured again
        return None


def _measure(
    source: TaskSource, subject: Subject, config: EvalConfig, progress: Callable[[float], None]
) -> TaskResult:
    from pocketllm.evaluate.harness import PocketLM, run_task

    model, tokenizer = subject.load()
    started = time.perf_counter()
    lm = PocketLM(model, tokenizer, config.batch_tokens, config.max_length, progress)
    got = run_task(lm, source.load(), config.limit)
    metrics = got["metrics"]
    acc, norm = (metrics.pop(name, (None, None)) for name in METRICS)
    return TaskResult(
        task=source.name,
        acc=acc[0],
        acc_stderr=acc[1],
        acc_norm=norm[0],
        acc_norm_stderr=norm[1],
        n=got["n"],
        limit=config.limit,
        chance=got["chance"],
        split=source.split,
        data=source.data,
        seconds=time.perf_counter() - started,
        versions={"task": got["version"], **_versions()},
        truncated=got["truncated"],
        other={name: {"value": value, "stderr": error} for name, (value, error) in metrics.items()},
        scores=got["scores"],
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("lm-eval", "torch", "transformers")}


def _identity(source: TaskSource, subject: Subject, config: EvalConfig) -> dict[str, Any]:
    """Everything a result depends on."""
    return {
        "model": subject.fingerprint,
        "setting": subject.setting,
        "task": source.name,
        "rows": source.rows,
        "split": source.split,
        "limit": config.limit,
        "max_length": config.max_length,
        "versions": _versions(),
    }


def _sources(name: str, data: Path | None, hub: bool) -> list[TaskSource]:
    from pocketllm.evaluate import harness

    task = local_tasks().get(name)
    if task is None:
        return [_from_hub(loaded) for loaded in harness.load_tasks(name, registry=True)]
    place = task.find(data)
    if place is not None:
        file, split = place
        ready = prepare(task, file, split)
        return [
            TaskSource(
                name=name,
                split=ready.split,
                data=ready.source,
                rows=ready.sha256,
                load=lambda: harness.load_tasks(str(ready.yaml))[0],
            )
        ]
    if not hub:
        raise SourceError(f"{name}: {_wanted(task, data)}")
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent / task.include
    try:
        return [_from_hub(loaded) for loaded in harness.load_tasks(str(stock))]
    except SourceError as error:
        raise SourceError(f"{name}: the Hub lookup failed, and {_wanted(task, data)}") from error


def _from_hub(task: Any) -> TaskSource:
    """A task that lm-eval has loaded together with its data."""
    return TaskSource(
        name=task.config.task, split="", data=f"hub: {task.DATASET_PATH}", rows="hub", load=lambda: task
    )


def _wanted(task: LocalTask, data: Path | None) -> str:
    files = " or ".join(file for file, _ in task.files)
    where = f"{data} contains no {files}" if data else f"no data folder is given (--data) with {files}"
    return f"{where}; the format: {task.form}"
