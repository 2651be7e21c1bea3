"""The record of a run beside its output: `OUTPUT.log/` with steps.jsonl, summary.json and curve.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketllm.machine import machine
from pocketllm.model.checkpoint import write_json

STEPS_NAME, SUMMARY_NAME, CURVE_NAME = "steps.jsonl", "summary.json", "curve.png"


class RunLog:
    """Writes the record; with enabled=False (processes other than the first) nothing.

    arguments: of the run, for the summary. device: that it runs on, cpu or cuda.
    """

    def __init__(
        self,
        output: Path,
        enabled: bool = True,
        arguments: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder, self.enabled = output.with_name(output.name + ".log"), enabled
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
                found.append(json.loads(line))
            except ValueError:
                continue
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
