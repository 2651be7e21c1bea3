"""`pocketllm report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketllm.cli.evaluated_models import Measuring, check_against, dense_of, model_of
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output, size
from pocketllm.cli.shared_options import (
    Adapter,
    Against,
    Check,
    Compressed,
    Context,
    Device,
    Dtype,
    Evaluations,
    Json,
    Ppl,
    Quiet,
    Threads,
    Trust,
    Windows,
)

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
def report(
    folder: Compressed,
    output: HtmlFile = None,
    adapter: Adapter = None,
    against: Against = None,
    ppl: Ppl = None,
    context: Context = 1024,
    windows: Windows = 0,
    evaluation: Evaluations = None,
    check: Check = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write one HTML file about a compressed model: sizes, errors, codebooks, weights, perplexity."""
    show = Output(json, quiet)
    from pocketllm.recover import check_adapter
    from pocketllm.report import check_html, default_output, html_report, only_read, read_evaluations
    from pocketllm.source import folder_of

    folder = folder_of(folder)
    name = model_of(folder, "report")
    if adapter is not None:
        check_adapter(adapter, folder)
    target = output or default_output(folder, adapter)
    check_html(target, only_read([folder], [adapter], against))
    check_against(against)
    evaluations = [found for path in evaluation or [] for found in read_evaluations(path)]
    setup_process(device, threads)
    with show.bars() as bars:
        if ppl is not None:
            measuring = Measuring(ppl, context, windows, dtype, device, trust_remote_code)
            models = [(folder, adapter), (folder, None)] if adapter else [(folder, None)]
            evaluations += measuring.evaluations(models, dense_of(against, [name]), bars)
        page = html_report(
            folder,
            target,
            adapter=adapter,
            against=against,
            evaluations=evaluations,
            check=check,
            trust_remote_code=trust_remote_code,
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
