"""The loss that a plan counts on, predicted and measured by the code as it is, on a small trained model.

The results of whole runs are in unit/test_predicted_loss.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm.config import CompressOptions
from pocketllm.source import resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA = os.environ.get("POCKETLLM_DATA", "")
WITHIN = 1.5
needs_data = pytest.mark.skipif(not DATA, reason="POCKETLLM_DATA names no folder")


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks/ by its name."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


def ratios(
    ours: Any, model: str, settings: list[str], texts: tuple[Path, str], folder: Path
) -> dict[str, float]:
    """Measured over predicted loss of both parts; texts: to calibrate on, to measure on."""
    loss = ours("predicted_loss")
    config = CompressOptions(bpw=4.0, calibration=(str(texts[0]),), settings=tuple(settings)).config()
    how = {"calibration_folder": folder / "measured"}
    report = pocketllm.compress(model, config, folder / "out", **how)
    wanted = loss.predicted(model, report.config, folder / "measured")
    found = loss.measured(resolve(model), folder / "out", texts[1], context=256, windows=12)
    return {part: found[part] / wanted[part] for part in ("ends", "blocks")}


@needs_data
def test_a_model_of_260_000_weights(ours: Any, tmp_path: Path) -> None:
    stories, dense = ours("stories"), tmp_path / "dense"
    stories.read_model(Path(DATA, "weights", "stories260K.bin")).save_pretrained(dense)
    stories.read_tokenizer(Path(DATA, "weights", "tok512.bin")).save_pretrained(dense)
    text = Path(DATA, "tinystories", "exllamav3_cal_tiny.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    quick = ["calibration.tokens=4096", "calibration.context=256", "calibration.sensitivity_tokens=2048"]
    quick += ["calibration.refine_epochs=0", "codec.trellis_width=10"]
    texts = tmp_path / "text.txt", text[len(text) // 2 :]
    for part, ratio in ratios(ours, str(dense), quick, texts, tmp_path).items():
        assert 1 / WITHIN < ratio < WITHIN, (part, ratio)
