"""`pocketllm compare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.evaluated_models import model_of
from pocketllm.cli.option_groups import MeasureOptions, RunOptions, with_groups
from pocketllm.cli.render import size

if TYPE_CHECKING:
    from pocketllm.report import Comparison

app = typer.Typer()

Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="Plot to write; NAME.png or NAME.svg writes both files.")
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(help="Adapter of one of the models: adds a row for base and adapter together; repeatable."),
]


@app.command(
    epilog="Examples:\n\n  pocketllm compare smol-8x smol-16x\n\n"
    "  pocketllm compare smol-*x -o smol.png --ppl wiki.test.raw --windows 16\n\n"
    "  pocketllm compare smol-2bit smol-2bit-tuned --adapter smol-2bit-lora\n\n"
    "  pocketllm compare smol-8x smol-16x --json"
)
@with_groups
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Compressed models: folders or Hub ids.")],
    *,
    output: Picture = None,
    adapter: Adapters = None,
    measured: MeasureOptions,
    run: RunOptions,
) -> None:
    """Compare compressed models in a table and a plot: bytes, ratios, errors, perplexity."""
    show, adapters = run.output(), adapter or []
    from pocketllm.report import base_of, check_picture, compare as compare_models, only_read, save_picture
    from pocketllm.source import folder_of

    folders = [folder_of(folder) for folder in folders]
    if output is not None:
        check_picture(output, only_read(folders, adapters, measured.against))
    names = [model_of(folder, "compare") for folder in folders]
    models = [*((folder, None) for folder in folders), *((base_of(a, folders), a) for a in adapters)]
    evaluations = measured.read()
    run.setup()
    with show.bars() as bars:
        evaluations += measured.measure(models, names, run, bars)
        on_progress = partial(bars.update, "check")
        found = compare_models(folders, evaluations, measured.check, on_progress, adapters)
    pictures = [] if output is None else [str(path) for path in save_picture(found, output)]
    show.result({**found.to_dict(), "pictures": pictures}, _table(found), *pictures)
    for note in found.notes:
        show.note(note)


def _table(found: Comparison) -> Any:
    from rich.table import Table

    table = Table(title="compressed models; means are weighted by size")
    headers = ["model", "bytes on disk", "smaller, bf16 / fp32", "bpw", "nmse", "nmse, blocks", "proxy error"]
    measured = found.setting is not None
    for header in [*headers, *(["perplexity"] if measured else [])]:
        table.add_column(header, justify="left" if header == "model" else "right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for m in found.models:
        row = [
            m.name,
            size(m.bytes_on_disk),
            f"{m.ratio_files_bf16:.2f}x / {m.ratio_files_fp32:.2f}x",
            f"{m.bpw_matrices:.3f}",
            number(m.nmse, ".4f"),
            number(m.nmse_blocks, ".4f"),
            number(m.proxy_error, ".5f"),
        ]
        table.add_row(*row, *([number(m.perplexity, ".3f")] if measured else []))
    if found.dense_perplexity is not None:
        table.add_row("dense", *[""] * (len(headers) - 1), number(found.dense_perplexity, ".3f"))
    if found.setting is not None:
        setting = found.setting
        table.caption = (
            f"perplexity on {setting['text']}, context {setting['context']}, {setting['windows']} windows"
        )
    return table
