"""Run a study step by step, resumable, and write its results completely or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.errors import ConfigError, ResumeError
from pocketllm.files import read_object, real_path, write_json
from pocketllm.format.output import check_not_nested, check_output, is_published, named_output, output_error
from pocketllm.format.workspace import Workspace, locked
from pocketllm.machine import machine
from pocketllm.report import need_matplotlib
from pocketllm.source import resolve_local
from pocketllm.studies.definition import Setup, Step, Study
from pocketllm.studies.registry import load
from pocketllm.studies.show import study_page
from pocketllm.studies.show.prose import need_jinja
from pocketllm.torch_state import in_default_torch_state

RESULT_NAME = "result.json"
_CONFIG = ("model", "weights", "quick", "texts", "device", "threads")
_INPUTS = ("calibration", "tasks")
_ADMINISTRATIVE = ("state.json", "lock")
Progress = Callable[[str, float], None]
"""Called with the current step and the finished share of the study."""


@dataclass(frozen=True)
class Outcome:
    """The output of a study. result: the contents of result.json. files: those in the folder."""

    output: Path
    result: dict[str, Any]
    files: tuple[Path, ...]


@in_default_torch_state
def run_study(
    name: str,
    model: str,
    output: str | Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    texts: Sequence[str | Path] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda step, share: None,
) -> Outcome:
    """Measure, and write OUTPUT/result.json, NAME.md, NAME.png and NAME.svg.

    Args:
        name: one of `STUDIES`. model: folder, Hub id or `builtin:smollm2-135m`.
        output: folder to create. An unfinished run with the same arguments is resumed.
        quick: a small version, within three minutes on two cores for the built-in model.
        texts: files to measure on, one unless the study takes several; None takes the default one.
        overwrite: replace the study at `output`.

    Raises:
        ConfigError: an unknown study, a compressed model, or texts that it does not measure on or that are too
            short for it.
        SourceError: as `open_dense`; no tokenizer where a text is measured on; matrices too small to study.
        OutputError: the output exists, lies in the model's folder or cannot be written. ResumeError: it was
            begun with other arguments. Nothing half-written is left under `output`; finished steps stay in
            `output.partial`.
        ExtraError: matplotlib or jinja2 is not installed.
    """
    study, output = load(name), named_output(output)
    need_matplotlib("studies")
    need_jinja()
    check_output(output, overwrite, f"{name}.svg", f"a study of {name!r}")
    if (folder := resolve_local(model)) is not None:
        check_not_nested(output, folder)
    setup = _setup(study, model, output, quick, seed, device, texts)
    result = _measured(study, setup, output, progress)
    progress("", 1.0)
    return Outcome(output, result, tuple(sorted(output.iterdir())))


def _measured(study: Study, setup: Setup, output: Path, progress: Progress) -> dict[str, Any]:
    """Run the steps that are not done yet and publish the finished folder; returns the contents of result.json."""
    asked, steps = _asked(study, setup), study.measurement.steps(setup)
    try:
        work = Workspace.at(output, asked)
        _check_files(work.folder, steps)
        if is_published(output):  # by an earlier run that was killed afterwards
            found = read_object(output / "result.json")
            work.drop()
            return found
        with locked(work.folder), _nothing_left(work.folder):
            setup.work.mkdir(exist_ok=True)
            done = {
                step.key: _run_step(step, work.folder, number, len(steps), progress)
                for number, step in enumerate(steps)
            }
            result = _body(study, setup, asked, output, done)
            final = work.folder / "final"
            final.mkdir(exist_ok=True)
            write_json(final / RESULT_NAME, result)
            study_page.write(study, result, final)
            work.publish(output)
    except OSError as error:
        raise output_error(output, error) from error
    return result


@in_default_torch_state
def dry_run(
    name: str,
    model: str,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    texts: Sequence[str | Path] | None = None,
) -> list[str]:
    """The steps that a study would run, by key; nothing is measured or written.

    Raises:
        ConfigError, SourceError: as `run_study`.
    """
    study = load(name)
    setup = _setup(study, model, Path(name), quick, seed, device, texts)
    _asked(study, setup)
    return [step.key for step in study.measurement.steps(setup)]


def _setup(
    study: Study,
    model: str,
    output: Path,
    quick: bool,
    seed: int,
    device: str,
    texts: Sequence[str | Path] | None,
) -> Setup:
    named = tuple(map(str, texts or ()))
    _check_texts(study, named)
    work = output.with_name(f"{output.name}.partial") / "work"
    return Setup(model, quick, seed, device, named or None, work, study.measurement.several_texts)


def _check_texts(study: Study, texts: Sequence[str]) -> None:
    """Raises ConfigError if some of the texts would not be used."""
    if texts and not study.measurement.on_text:
        raise ConfigError(f"{study.name}: does not use text; omit the texts")
    if len(texts) > 1 and not study.measurement.several_texts:
        raise ConfigError(f"{study.name}: uses one text, got {len(texts)}; name one of them")
    places = [real_path(Path(text)) for text in texts]
    for text, place in zip(texts, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{text}: given twice; name every text once")


def _asked(study: Study, setup: Setup) -> dict[str, Any]:
    """Everything that the results depend on, except the versions of installed packages."""
    return {
        "study": study.name,
        "model": setup.model,
        "weights": setup.source().fingerprint(),
        "quick": setup.quick,
        "seed": setup.seed,
        "device": setup.device,
        "threads": torch.get_num_threads(),
        "texts": {t.name: t.digest for t in setup.evaluation_texts()} if study.measurement.on_text else {},
        "version": pocketllm.__version__,
        **study.measurement.inputs(setup),
    }


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Remove the folder of a study that fails before a step is finished."""
    try:
        yield
    except BaseException:
        if not any(path.is_file() and path.name not in _ADMINISTRATIVE for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _file(folder: Path, step: Step) -> Path:
    return folder / f"step-{step.key}.json"


def _check_files(folder: Path, steps: Sequence[Step]) -> None:
    """Raises ResumeError if something else exists under the name of a step's file."""
    for step in steps:
        file = _file(folder, step)
        if file.exists() and not file.is_file():
            kind = "a folder" if file.is_dir() else "not a file"
            raise ResumeError(
                f"{file}: {kind}, wanted the file of a finished step; move it away and rerun the command"
            )


def _run_step(step: Step, folder: Path, number: int, count: int, progress: Progress) -> dict[str, Any]:
    """Run a step and keep its values, unless an earlier run has kept them."""
    progress(step.key, number / count)
    kept = _kept(_file(folder, step))
    if kept is not None:
        return kept
    started = time.monotonic()
    values = step.run(lambda share: progress(step.key, (number + share) / count))
    found = {"seconds": round(time.monotonic() - started, 3), "values": _plain(values)}
    write_json(_file(folder, step), {**found, "digest": _digest(found)})
    kept = _kept(_file(folder, step))
    assert kept is not None
    return kept


def _kept(file: Path) -> dict[str, Any] | None:
    """The values of a finished step; None if they are missing or damaged, so that the step runs again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    digest = found.pop("digest", None) if isinstance(found, dict) else None
    return found if digest is not None and digest == _digest(found) else None


def _digest(found: Mapping[str, Any]) -> str:
    """A digest of a step's values in plain JSON types: unchanged when read back, different after any damage."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Replace infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _body(
    study: Study, setup: Setup, asked: Mapping[str, Any], output: Path, done: Mapping[str, Any]
) -> dict[str, Any]:
    results = {key: entry["values"] for key, entry in done.items()}
    return {
        "study": study.name,
        "config": {key: asked[key] for key in (*_CONFIG, *_INPUTS) if key in asked},
        "seed": setup.seed,
        "command": _command(study, setup, asked, output),
        "machine": machine(setup.device),
        "seconds": round(sum(entry["seconds"] for entry in done.values()), 1),
        "step_seconds": {key: entry["seconds"] for key, entry in done.items()},
        "findings": study.findings(results),
        "results": results,
    }


def _command(study: Study, setup: Setup, asked: Mapping[str, Any], output: Path) -> str:
    """The command line that does the same again; where it looks for files in `POCKETLLM_DATA`, with a gap for it."""
    from pocketllm.studies.measure.compressed_models import data_folder

    words = ["pocketllm", "study", study.name, setup.model, "-o", str(output)]
    words += ["--quick"] if setup.quick else []
    words += ["--seed", str(setup.seed)] if setup.seed else []
    words += ["--device", setup.device] if setup.device != "cpu" else []
    words += ["--threads", str(asked["threads"])]
    command = shlex.join([*words, *(word for text in setup.texts or () for word in ("--text", text))])
    finds = (study.measurement.on_text and not setup.texts) or any(asked.get(key) for key in _INPUTS)
    return f"POCKETLLM_DATA=... {command}" if finds and data_folder() is not None else command
