"""Reports about compressed models: one HTML file about a model, or a table and a plot of several."""

from __future__ import annotations

from pocketllm.report.card_figures import perplexity_figure, read_figures
from pocketllm.report.comparison import Compared, Comparison, base_of, compare
from pocketllm.report.comparison_plot import check_picture, draw, save_picture
from pocketllm.report.evaluations import Evaluation, read_evaluations
from pocketllm.report.html_page import Page, check_html, default_output, html_report
from pocketllm.report.model_facts import MatrixFacts, ModelFacts, block_of, read_model
from pocketllm.report.output_files import only_read
from pocketllm.report.svg import drawing, need_matplotlib
from pocketllm.report.tables import short

__all__ = [
    "Compared",
    "Comparison",
    "Evaluation",
    "MatrixFacts",
    "ModelFacts",
    "Page",
    "base_of",
    "block_of",
    "check_html",
    "check_picture",
    "compare",
    "default_output",
    "draw",
    "drawing",
    "html_report",
    "need_matplotlib",
    "only_read",
    "perplexity_figure",
    "read_evaluations",
    "read_figures",
    "read_model",
    "save_picture",
    "short",
]
