"""`pocketllm study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Device, Json, Overwrite, Quiet, Seed, Threads
from pocketllm.studies.registry import STUDIES, check_name

app = typer.Typer()

_NAMES = "\n\n".join(f"  {name}: {title}" for name, title in STUDIES.items())


@app.command(
    epilog=f"Studies:\n\n{_NAMES}\n\nExamples:\n\n"
    "  pocketllm study rln builtin:smollm2-135m -o rln --quick\n\n"
    "  pocketllm study codebook ./my-model -o codebook --text wiki.test.raw\n\n"
    "  pocketllm study overfit builtin:smollm2-135m -o overfit --dry-run"
)
def study(
    name: Annotated[str, typer.Argument(help="Name of the study, as listed below.")],
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or builtin:smollm2-135m.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to create. Default: the name of the study.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a small version: less than three minutes.")
    ] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to measure on; repeatable for the study robustness, which takes several."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the steps; measure nothing.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure one of the paper's claims; writes result.json, a Markdown page and a plot."""
    check_name(name)
    show = Output(json, quiet)
    setup_process(device, threads)
    from pocketllm import studies

    how: dict[str, Any] = {"quick": quick, "seed": seed, "device": device, "texts": text}
    if dry_run:
        steps = studies.dry_run(name, model, **how)
        values = {"study": name, "model": model, "quick": quick, "steps": steps}
        show.result(values, f"{name}, {len(steps)} steps:", *(f"  {step}" for step in steps))
        return
    with show.bars() as bars:
        done = studies.run_study(
            name,
            model,
            output or Path(name),
            **how,
            overwrite=overwrite,
            progress=lambda step, share: bars.update("study", share, step),
        )
    files = [str(path) for path in done.files]
    found = studies.load(name)
    tables = [part for table in found.tables(done.result["results"]) for part in (_table(table), table.note)]
    lines = [f"- {sentence}" for sentence in done.result["findings"]]
    show.result({**done.result, "output": str(done.output), "files": files}, *tables, *lines, *files)


def _table(table: Any) -> Any:
    from rich.table import Table

    shown = Table(title=table.title)
    for header in table.header:
        shown.add_column(header, overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown
