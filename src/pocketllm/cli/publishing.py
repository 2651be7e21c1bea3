"""A finished model on its way to the Hub: measured values on its card, the upload."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketllm.cli.render import Bars
from pocketllm.cli.text_perplexity import EvalText

if TYPE_CHECKING:
    from pocketllm import Report


def with_measured_card(
    report: Report, folder: Path, text: EvalText | None, measured: Mapping[str, Any]
) -> Report:
    """Write perplexities, if there are any, on the model card; the report with the sizes that count it.

    Args:
        measured: as `EvalText.measure` gives it, by title: `dense` first, the finished model last.
    """
    from pocketllm.format import read_report, write_card
    from pocketllm.report import perplexity_figure

    if text is None or not measured:
        return report
    own, dense = list(measured.values())[-1]["perplexity"], measured["dense"]["perplexity"]
    windows = measured["dense"]["windows"]
    write_card(folder, [perplexity_figure(text.name, text.context, windows, own=own, dense=dense)])
    found = read_report(folder)
    sizes = ("bytes_on_disk", "bytes_by_part", "ratio_files_bf16", "ratio_files_fp32")
    return dataclasses.replace(report, **{key: found[key] for key in sizes})


def push_folder(bars: Bars, folder: Path, repository: str, private: bool) -> str:
    """Upload a compressed model; returns the address of the commit."""
    import pocketllm

    bars.update("push", 0.0, repository)
    address = pocketllm.push(folder, repository, private)
    bars.update("push", 1.0, address)
    return address
