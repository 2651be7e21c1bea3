"""`pocketllm report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketllm.cli.evaluated_models import check_against, model_of
from pocketllm.cli.option_groups import MeasureOptions, RunOptions, with_groups
from pocketllm.cli.render import Output, size
from pocketllm.cli.shared_options import Adapter, Compressed

if TYPE_CHECKING:
    from pocketllm.report import Evaluation, Page

app = typer.Typer()

HtmlFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write. Default: FOLDER.html next to the folder."),
]


@app.command(
    epilog="Examples:\n\n  pocketllm report smol-8x\n\n"
    "  pocketllm report smol-8x -o smol.html --against builtin:smollm2-135m\n\n"
    "  pocketllm report smol-8x --ppl wiki.test.raw --context 1024 --windows 16\n\n"
    "  pocketllm report smol-8x --evaluation smol.json --evaluation dense.json\n\n"
    "  pocketllm report smol-2bit --adapter smol-2bit-lora --ppl wiki.test.raw"
)
@with_groups
def report(
    folder: Compressed,
    *,
    output: HtmlFile = None,
    adapter: Adapter = None,
    measured: MeasureOptions,
    run: RunOptions,
) -> None:
    """Write one HTML file about a compressed model: sizes, errors, codebooks, weights, perplexity."""
    show = run.output()
    from pocketllm.recover import check_adapter
    from pocketllm.report import check_html, default_output, html_report, only_read
    from pocketllm.source import folder_of

    folder = folder_of(folder)
    name = model_of(folder, "report")
    if adapter is not None:
        check_adapter(adapter, folder)
    target = output or default_output(folder, adapter)
    check_html(target, only_read([folder], [adapter], measured.against))
    check_against(measured.against)
    evaluations = measured.read()
    run.setup()
    with show.bars() as bars:
        adapted = [] if adapter is None else [(folder, adapter)]
        evaluations += measured.measure([*adapted, (folder, None)], [name], run, bars)
        page = html_report(
            folder,
            target,
            adapter=adapter,
            against=measured.against,
            evaluations=evaluations,
            check=measured.check,
            trust_remote_code=run.trust_remote_code,
            progress=bars.update,
        )
    _show(show, page, evaluations)


def _show(show: Output, page: Page, evaluations: list[Evaluation]) -> None:
    values = {**dataclasses.asdict(page), "output": str(page.output)}
    values["evaluations"] = [dataclasses.asdict(found) for found in evaluations]
    show.result(values, f"{page.output}: {size(page.bytes)}")
    for section, reason in page.absent.items():
        show.note(f"{section}: {reason}")
    if page.mismatch:
        show.note(page.mismatch)
