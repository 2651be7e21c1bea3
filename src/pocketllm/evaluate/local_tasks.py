"""lm-eval tasks on local files, for machines without access to the hub.

Each YAML under `task_files/` names one of lm-eval's own tasks, the files it can be read from and their format.
Rows are rewritten to the field names that lm-eval's task expects and stored in the cache, together with a task YAML
that includes lm-eval's own and points at them; it also works with lm-eval's `--tasks FILE`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """One of lm-eval's tasks, readable from a local file.

    include: its YAML, relative to lm-eval's tasks. files: (path in the data folder, split), best first.
    reader: name of the function that rewrites a row. form: description of what a file must hold.
    """

    name: str
    include: str
    files: tuple[tuple[str, str], ...]
    reader: str
    form: str

    def find(self, data: Path | None) -> tuple[Path, str] | None:
        """(file, split) in a data folder; None if it holds none of the files."""
        if data is None:
            return None
        return next(((data / file, split) for file, split in self.files if (data / file).is_file()), None)


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to run. yaml: its file for lm-eval. source, split: where its rows come from.

    sha256: digest of the rewritten rows.
    """

    yaml: Path
    source: str
    split: str
    sha256: str


@cache
def local_tasks() -> dict[str, LocalTask]:
    """Every task that can be read from local files, by its lm-eval name."""
    import yaml

    found = {}
    for entry in resources.files("pocketllm.evaluate").joinpath("task_files").iterdir():
        if entry.name.endswith(".yaml"):
            values = yaml.safe_load(entry.read_text(encoding="utf-8"))
            local = values["local"]
            found[values["task"]] = LocalTask(
                name=values["task"],
                include=values["include"],
                files=tuple(local["files"].items()),
                reader=local["reader"],
                form=local["form"],
            )
    return dict(sorted(found.items()))


def local_task_names(data: Path | None) -> list[str]:
    """lm-eval names of the tasks whose files a data folder holds; none if there is no folder."""
    return [task.name for task in local_tasks().values() if task.find(data)]


def local_task_digest(name: str, data: Path | None) -> str:
    """Digest of the files that a local task is read from, including a separate file of labels.

    Raises:
        SourceError: the data folder does not contain it.
    """
    place = local_tasks()[name].find(data)
    if place is None:
        raise SourceError(f"{name}: no file for this task in {data or 'the data folder (none is given)'}")
    body = place[0].read_bytes() + "\n".join(_labels(place[0]) or []).encode()
    return hashlib.sha256(body).hexdigest()[:16]


def prepare(task: LocalTask, file: Path, split: str) -> Prepared:
    """Rewrite a local file for lm-eval, in the cache.

    Raises:
        SourceError: the file cannot be read, or a row has another format; names file and line.
    """
    import lm_eval.tasks
    import yaml

    stock = Path(lm_eval.tasks.__file__).parent / task.include
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in _rows(task, file)]
    if not lines:
        raise SourceError(f"{file}: contains no rows; wanted {task.form}")
    body = ("\n".join(lines) + "\n").encode()
    digest = hashlib.sha256(body).hexdigest()
    folder = cache_folder() / "eval" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"{task.name}-{digest[:16]}.jsonl"
    config = {
        "include": str(stock),
        "task": task.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows)}, "cache_dir": str(folder / "arrow")},
        "training_split": None,
        "fewshot_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }
    path = rows.with_name(f"{rows.stem}-{split}.yaml")
    _write(rows, body)
    _write(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    return Prepared(yaml=path, source="/".join(file.parts[-2:]), split=split, sha256=digest)


def _write(path: Path, body: bytes) -> None:
    """Write a file atomically, unless it exists with this content."""
    if path.is_file() and path.read_bytes() == body:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(body)
    temporary.replace(path)


def _rows(task: LocalTask, file: Path) -> Iterator[Row]:
    read = _READERS[task.reader]
    try:
        text = file.read_text(encoding="utf-8")
        labels = _labels(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if labels is not None and len(labels) != len(numbered):
        raise SourceError(
            f"{file}: has {len(numbered)} rows, its labels file {len(labels)}; the two do not match"
        )
    for position, (number, line) in enumerate(numbered):
        try:
            row = json.loads(line)
            if labels is not None:
                row.setdefault("label", labels[position])
            yield read(row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise SourceError(f"{file}, line {number}: {reason}; wanted {task.form}") from error


def _labels(file: Path) -> list[str] | None:
    """Labels from a separate file (PIQA's), or None."""
    path = file.with_name(f"{file.stem}-labels.lst")
    return path.read_text(encoding="utf-8").split() if path.is_file() else None


def _piqa(row: Row) -> Row:
    return {**_texts(row, "goal", "sol1", "sol2"), "label": _choice(row["label"], 2)}


def _winogrande(row: Row) -> Row:
    texts = _texts(row, "sentence", "option1", "option2")
    texts["sentence"].index("_")  # ValueError if the blank is missing
    return {**texts, "answer": str(_choice(int(row["answer"]) - 1, 2) + 1)}


def _arc(row: Row) -> Row:
    return {"question": _question(row, "question"), **_choices(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": _question(row, "question_stem"), **_choices(row)}


def _question(row: Row, name: str) -> str:
    """The bare question, from a flat row, an AI2 row (`stem`), or a row that holds the full prompt."""
    if "query" in row:
        return str(row["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")
    question = row["question"] if name not in row else row[name]
    return str(question["stem"] if isinstance(question, dict) else question)


def _choices(row: Row) -> Row:
    """`choices` and `answerKey` from any of the three formats in use."""
    nested = row.get("question")
    choices = nested["choices"] if isinstance(nested, dict) else row["choices"]
    if isinstance(choices, dict):
        texts, labels = list(choices["text"]), [str(label) for label in choices["label"]]
    elif "gold" in row:
        texts, labels = list(choices), [chr(ord("A") + n) for n in range(len(choices))]
    else:
        texts, labels = [c["text"] for c in choices], [str(c["label"]) for c in choices]
    answer = labels[_choice(row["gold"], len(labels))] if "gold" in row else str(row["answerKey"]).strip()
    labels.index(answer)  # ValueError if the answer is none of the labels
    return {"choices": {"text": texts, "label": labels}, "answerKey": answer}


def _boolq(row: Row) -> Row:
    texts = _texts(row, "question", "passage")
    title = row.get("title")
    if title and not texts["passage"].startswith(f"{title} -- "):
        texts["passage"] = f"{title} -- {texts['passage']}"
    return {**texts, "label": _choice(row["label"] if "label" in row else row["answer"], 2)}


def _lambada(row: Row) -> Row:
    return _texts(row, "text")


def _hellaswag(row: Row) -> Row:
    endings = [str(ending) for ending in row["endings"]]
    label = str(_choice(row["label"], len(endings)))
    return {**_texts(row, "activity_label", "ctx_a", "ctx_b"), "endings": endings, "label": label}


def _texts(row: Row, *names: str) -> Row:
    return {name: str(row[name]) for name in names}


def _choice(value: Any, count: int) -> int:
    """The number of one of `count` choices.

    Raises:
        ValueError: out of range; the caller adds file and line.
    """
    number = int(value)
    if not 0 <= number < count:
        raise ValueError(f"label {value!r} is not one of the {count} choices")
    return number


_READERS: dict[str, Callable[[Row], Row]] = {
    "piqa": _piqa,
    "winogrande": _winogrande,
    "arc": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "lambada": _lambada,
    "hellaswag": _hellaswag,
}
