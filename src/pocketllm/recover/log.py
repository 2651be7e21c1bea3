"""The record of a run: steps.jsonl, summary.json and curve.png, in `OUTPUT.log/` when the run is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pocketllm.errors import OutputError
from pocketllm.files import read_object, write_json
from pocketllm.format.checkpoint import REPORT_NAME
from pocketllm.format.output import check_output, partial_folder
from pocketllm.format.workspace import Workspace, damaged
from pocketllm.machine import machine

Done = TypeVar("Done")
STEPS_NAME, SUMMARY_NAME, CURVE_NAME = "steps.jsonl", "summary.json", "curve.png"


def log_folder(output: Path) -> Path:
    """Where the record of a finished run lies."""
    return output.with_name(output.name + ".log")


def check_places(
    output: Path, overwrite: bool, marker: str = REPORT_NAME, what: str = "a compressed model"
) -> None:
    """`check_output`, and the same for the record: neither is replaced unasked, nor what is none.

    Raises:
        OutputError: as `check_output`; or there is something where the record shall be.
    """
    check_output(output, overwrite, marker, what)
    folder = log_folder(output)
    if not folder.exists() or Workspace.is_begun(output):
        return
    if not (folder / STEPS_NAME).is_file():
        raise OutputError(
            f"{folder}: exists and is not the record of a run; move it away, or choose another output folder"
        )
    if not overwrite:
        raise OutputError(f"{folder}: the record of an earlier run; move it away, or pass --overwrite")


def finished(output: Path, kind: type[Done]) -> Done:
    """What a finished run did, from its record.

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
    """Writes the record into a folder; with enabled=False (processes other than the first) nothing.

    arguments: of the run, for the summary. device: that it runs on, cpu or cuda.
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
        """Drop lines after a step, which will be run again."""
        if not self.enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STEPS_NAME
        kept = [json.dumps(line) + "\n" for line in self.steps() if line["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")

    def steps(self) -> list[dict[str, Any]]:
        """All lines so far; one that a kill cut off is left out."""
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
        """One step."""
        if self.enabled:
            with (self.folder / STEPS_NAME).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    def finish(self, summary: Mapping[str, Any], history: list[tuple[int, float]]) -> None:
        """The summary, and the picture where matplotlib is installed. history: (step, validation loss)."""
        if self.enabled:
            facts = {"validation": history, "arguments": self.arguments, "machine": machine(self.device)}
            body = {**summary, **facts}
            write_json(self.folder / SUMMARY_NAME, body)
            draw(self.steps(), body, self.folder / CURVE_NAME)

    def publish(self, output: Path) -> None:
        """Copy the record to its place; what lies there of an earlier run goes."""
        if not self.enabled:
            return
        place, temporary = log_folder(output), self.folder.with_name("log.copy")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.folder, temporary)
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)


def draw(steps: list[dict[str, Any]], summary: Mapping[str, Any], path: Path) -> bool:
    """Loss over steps as a PNG; False where matplotlib is missing."""
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
