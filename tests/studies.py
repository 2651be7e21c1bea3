"""Tiny models to study, a study's setup, and the studies of the codec run small."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pocketllm.studies import Outcome, run_study
from pocketllm.studies.definition import Finding, Measurement, Results, Setup, Step, Study, Table
from pocketllm.studies.measure import (
    codebook_steps,
    depth_steps,
    overfit_steps,
    rln_steps,
    utilization_steps,
)
from pocketllm.studies.show import plot
from pocketllm.studies.show.prose import Prose
from tests import tiny

STEPS = {
    "rln": rln_steps,
    "depth": depth_steps,
    "utilization": utilization_steps,
    "overfit": overfit_steps,
    "codebook": codebook_steps,
}
"""Study of the codec -> the module of its steps."""
CODEC_SIZES: dict[str, dict[str, Any]] = {
    "rln": {"_SIZE": 16, "_QUICK_EPOCHS": 1},
    "depth": {"_SIZE": 16, "_QUICK_EPOCHS": 1},
    "utilization": {"_QUICK_SIZE": 16, "_QUICK_EPOCHS": 2},
    "overfit": {
        "QUICK_CURVES": ((8, 16),),
        "_QUICK_EPOCHS": 1,
        "QUICK_SWEEP": ((4, 16), (2, 16), (1, 16), (1, 1024)),
        "QUICK_TWINS": ((4, 16), (2, 16)),
    },
    "codebook": {"QUICK_GRID": ((1, 2), (2, 4), (4, 8), (4, 4)), "QUICK_MODELS": ((1, 2), (2, 4))},
}
"""Study of the codec -> what makes it small enough for a tiny model."""


def small_model(factory: pytest.TempPathFactory) -> str:
    """Folder of a model of three blocks."""
    folder = factory.mktemp("model-studies") / "dense"
    return str(tiny.save(folder, max_position_embeddings=512, num_hidden_layers=3))


def setup_of(model: str, work: Path, quick: bool = True) -> Setup:
    return Setup(model, quick, 0, "cpu", None, work)


def small_codec_model(factory: pytest.TempPathFactory) -> str:
    """Folder of a model whose matrices are just large enough for a codebook."""
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512}
    return str(tiny.save(factory.mktemp("codec-studies") / "dense", **sizes))


class CodecStudies:
    """The studies of the codec, by name: each is run once, in its small version, when it is first asked for."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self._folder = model, folder
        self._done: dict[str, Outcome] = {}

    def __getitem__(self, name: str) -> Outcome:
        if name not in self._done:
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("POCKETLLM_DATA", raising=False)
                for size, value in CODEC_SIZES[name].items():
                    patch.setattr(STEPS[name], size, value)
                self._done[name] = run_study(name, self.model, self._folder / name, quick=True)
        return self._done[name]

    def results(self, name: str) -> dict[str, Any]:
        """A copy to change."""
        return copy.deepcopy(self[name].result["results"])


_WORDS = {
    "Claim": "It counts.",
    "Method": "Steps.",
    "Findings": "## steps run\n{{ count }} steps ran.",
}


def _panel(results: Any) -> plot.Panel:
    values = [found["value"] or 0 for found in results.values()]
    return plot.Panel("values", [plot.mark("plot", range(len(values)), values)])


class _CountingStudy(Study):
    """A study whose cells hold what Markdown would misread."""

    def tables(self, results: Results) -> list[Table]:
        return [Table("Steps", ["step", "of"], [[key, "a_b`|c"] for key in results], "all | of them")]


class Counting:
    """A study of three steps that notes which of them ran, and stops at one where it is told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stop_at: str | None = None
        self.words: dict[str, str] = {}
        self.more: dict[str, Any] = {}

    def steps(self, setup: Setup) -> list[Step]:
        return [self._step(key, value) for key, value in (("a", 1.0), ("b", 2.0), ("c", float("inf")))]

    def _step(self, key: str, value: float) -> Step:
        def run(progress: Any) -> dict[str, Any]:
            if key == self.stop_at:
                raise KeyboardInterrupt
            progress(0.5)
            self.ran.append(key)
            return {"value": value}

        return Step(key, run)

    def study(self) -> Study:
        return _CountingStudy(
            "counting",
            "steps are counted",
            Prose("", {**_WORDS, **self.words}),
            Measurement(self.steps, **self.more),
            [Finding("steps run", lambda results: [{"count": len(results)}])],
            lambda results: plot.Picture(6, 4, [plot.Part([[_panel(results)]])]),
        )
