"""Tiny models whose pages the tests of `pocketllm report` look at."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pocketllm
from pocketllm import LoraTuneConfig
from pocketllm.config import CalibrationConfig
from tests import tiny
from tests.recovery import quick_loop

if TYPE_CHECKING:
    from pocketllm.report.sections import Section

MEASURE = ["--context", "32", "--windows", "2"]


def paragraphs(section: Section) -> list[str]:
    """The text above the charts and tables of a section, as a reader sees it."""
    from pocketllm.report.rendering import render_section

    above = re.split('<div class="(?:charts|scroll)"|<details', render_section(section))[0]
    return [html.unescape(" ".join(text.split())) for text in re.findall("<p>(.*?)</p>", above, re.DOTALL)]


def make(folder: Path) -> Path:
    """A folder with dense, small (calibrated), other (no calibration), moe-dense, moe; text.txt."""
    tiny.save(folder / "dense")
    calibration = CalibrationConfig(tokens=128, context=32)
    pocketllm.compress(folder / "dense", tiny.settings(calibration=calibration), folder / "small")
    pocketllm.compress(folder / "dense", tiny.settings(codebook_scope="model"), folder / "other")
    moe = tiny.save(folder / "moe-dense", "mixtral", num_hidden_layers=1)
    pocketllm.compress(moe, tiny.settings(codebook_scope="matrix", decoder_scope="matrix"), folder / "moe")
    (folder / "text.txt").write_text("a text that is long enough for some windows. " * 20)
    return folder


def make_adapter(folder: Path) -> Path:
    """An adapter `tuned` of the model `small` in a folder that `make` made."""
    config = LoraTuneConfig(
        rank=4,
        alpha=8,
        steps=2,
        context=24,
        texts=(str(folder / "text.txt"),),
        validation_items=4,
        loop=quick_loop(warmup=0.1),
    )
    pocketllm.lora(folder / "small", folder / "tuned", config)
    return folder / "tuned"


def full_page(folder: Path, adapter: Path | None = None) -> Path:
    """The page of the model `small` with everything on it, perplexities included."""
    from pocketllm.report import Evaluation, html_report

    setting = {"text": "text.txt", "context": 32, "windows": 2, "tokens": 62}
    measured = [
        {"perplexity": 20.5, "model": "small", "compressed": True},
        {"perplexity": 10.25, "model": "dense", "compressed": False},
    ]
    if adapter is not None:
        measured.insert(0, {**measured[0], "perplexity": 15.5, "adapter": str(adapter)})
    evaluations = [Evaluation.from_dict({**setting, **values}) for values in measured]
    output = folder / ("page.html" if adapter is None else "page-with-adapter.html")
    return html_report(folder / "small", output, adapter=adapter, evaluations=evaluations).output
