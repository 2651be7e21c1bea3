"""Pictures of compressed models: one HTML file about a model, or a table and a picture of several."""

from __future__ import annotations

from pocketllm.report.compare import Compared, Comparison, base_of, compare
from pocketllm.report.evaluations import Evaluation, read_evaluations
from pocketllm.report.html import Page, check_html, default_output, html_report
from pocketllm.report.picture import check_picture, draw, save_picture

__all__ = [
    "Compared",
    "Comparison",
    "Evaluation",
    "Page",
    "base_of",
    "check_html",
    "check_picture",
    "compare",
    "default_output",
    "draw",
    "html_report",
    "read_evaluations",
    "save_picture",
]
