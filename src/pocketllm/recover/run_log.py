"""A run: its unfinished output, and its log (steps.jsonl, summary.json, curve.png; finally in `OUTPUT.log/`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

import pocketllm
from pocketllm.config import LoopConfig
from pocketllm.errors import OutputError
from pocketllm.files import read_object, write_json
from pocketllm.format.checkpoint import REPORT_NAME
from pocketllm.format.output import check_output, check_still_free, output_error, partial_folder
from pocketllm.format.workspace import Workspace, damaged, locked
from pocketllm.machine import machine
from pocketllm.recover.base_model import Base, compute_dtype

Result = TypeVar("Result")
STEPS_NAME, SUMMARY_NAME, CURVE_NAME = "steps.jsonl", "summary.json", "curve.png"


def log_folder(output: Path) -> Path:
    """Folder of the log of a finished run."""
    return output.with_name(output.name + ".log")


def check_places(
    output: Path, overwrite: bool, marker: str = REPORT_NAME, what: str = "a compressed model"
) -> None:
    """Check that output and log can be written: `check_output`, and the same for the log's folder.

    Raises:
        OutputError: as `check_output`; or the log's folder exists and is not a log, or is not to be overwritten.
    """
    check_output(output, overwrite, marker, what)
    folder = log_folder(output)
    if not folder.exists() or Workspace.is_begun(output):
        return
    if not (folder / STEPS_NAME).is_file():
        raise OutputError(
            f"{folder}: exists and is not the log of a run; move it away, or choose another output folder"
        )
    if not overwrite:
        raise OutputError(f"{folder}: the log of an earlier run; move it away, or pass --overwrite")


def read_result(output: Path, kind: type[Result]) -> Result:
    """Read the result of a finished run from its record.

    Args:
        kind: a dataclass, whose fields the record has.

    Raises:
        ResumeError: the record is damaged.
    """
    path = log_folder(output) / SUMMARY_NAME
    try:
        facts = read_object(path)
        return kind(**{name: facts[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError) as error:
        raise damaged(path, partial_folder(output), error) from error


class RunLog:
    """Writes the log into a folder; with enabled=False (processes other than the first) it writes nothing.

    Args:
        arguments: everything that the run's result depends on, for the summary.
        device: type of device that the run uses, cpu or cuda.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool = True,
        arguments: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self.arguments, self.device = dict(arguments or {}), device

    def resume_at(self, step: int) -> None:
        """Drop the lines after a step; those steps will run again."""
        if not self.enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STEPS_NAME
        kept = [json.dumps(line) + "\n" for line in self.steps() if line["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")

    def steps(self) -> list[dict[str, Any]]:
        """All lines so far, without one that an interruption cut off."""
        path = self.folder / STEPS_NAME
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                facts = json.loads(line)
            except ValueError:
                continue
            if isinstance(facts, dict) and "step" in facts:
                found.append(facts)
        return found

    def add(self, values: Mapping[str, Any]) -> None:
        """Append the values of one step."""
        if self.enabled:
            with (self.folder / STEPS_NAME).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    def finish(self, summary: Mapping[str, Any], history: list[tuple[int, float]]) -> None:
        """Write the summary, and the curve if matplotlib is installed. history: (step, validation loss)."""
        if self.enabled:
            facts = {"validation": history, "arguments": self.arguments, "machine": machine(self.device)}
            body = {**summary, **facts}
            write_json(self.folder / SUMMARY_NAME, body)
            draw(self.steps(), body, self.folder / CURVE_NAME)

    def publish(self, output: Path) -> None:
        """Copy the log to its final folder, replacing that of an earlier run."""
        if not self.enabled:
            return
        place, temporary = log_folder(output), self.folder.with_name("log.copy")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.folder, temporary)
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)


@dataclass(frozen=True)
class Run:
    """A run in progress; no other run uses its folder meanwhile.

    output: final folder of the result. overwrite: whether it may replace another.
    work: the unfinished output. log: of this run.
    state: this process among those launched together. dtype: of matrix products.
    """

    output: Path
    overwrite: bool
    work: Workspace
    log: RunLog
    state: PartialState
    dtype: torch.dtype

    def write(self, write: Callable[[Path], object]) -> Path:
        """Let the main process write the result into a folder; returns the folder when it is complete."""
        final = self.work.folder / "final"
        if self.state.is_main_process:
            write(final)
        self.state.wait_for_everyone()
        return final

    def finish(self, summary: Mapping[str, Any], history: list[tuple[int, float]]) -> None:
        """Complete the log, then move log and result to their final folders; every process waits for that."""
        self.log.finish(summary, history)
        if self.state.is_main_process:
            check_still_free(self.output, self.overwrite)
            self.log.publish(self.output)
            self.work.publish(self.output, self.overwrite)
        self.state.wait_for_everyone()

    def recall(self, kind: type[Result]) -> Result:
        """The result of an earlier run that was killed after it was published; the unfinished folder is removed.

        Raises:
            ResumeError: the record is damaged.
        """
        done = read_result(self.output, kind)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.work.drop()
        return done


@contextmanager
def open_run(
    output: Path,
    base: Base,
    arguments: Mapping[str, Any],
    config: LoopConfig,
    device: str,
    overwrite: bool,
) -> Iterator[Run]:
    """Start or resume the run of an output.

    Args:
        arguments: what the result depends on, apart from base, device, dtype, processes and threads.

    Raises:
        ResumeError: the folder holds a run with other arguments.
        OutputError: it is in use, or cannot be written.
    """
    state = PartialState(cpu=device == "cpu")
    dtype = compute_dtype(config.dtype, state.device)
    everything = {
        "version": pocketllm.__version__,
        "base": base.identity,
        "device": state.device.type,
        "dtype": str(dtype),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        **arguments,
    }
    try:
        with state.main_process_first():
            work = Workspace.at(output, everything)
        with locked(work.folder, state.is_main_process):
            log = RunLog(
                work.folder / "log",
                enabled=state.is_main_process,
                arguments=everything,
                device=state.device.type,
            )
            yield Run(output=output, overwrite=overwrite, work=work, log=log, state=state, dtype=dtype)
    except OSError as error:
        raise output_error(output, error) from error


def draw(steps: list[dict[str, Any]], summary: Mapping[str, Any], path: Path) -> bool:
    """Draw loss over steps as a PNG; False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=1, label="training")
    history = summary.get("validation", [])
    axes.plot([s for s, _ in history], [v for _, v in history], marker="o", markersize=3, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel(summary.get("loss_name", "loss"))
    axes.set_title(summary.get("title", ""), fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
