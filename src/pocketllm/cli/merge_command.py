"""`pocketllm merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.model_loading import dtype_of
from pocketllm.cli.option_groups import RunOptions, with_groups
from pocketllm.cli.result_table import result_table
from pocketllm.cli.shared_options import Context, DenseDtype, To, Windows

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm merge smol-2bit --adapter smol-adapter --to smol-merged\n\n"
    "  pocketllm merge smol-2bit --adapter smol-adapter --to smol-2bit-b --reencode --text wiki.valid.raw"
)
@with_groups
def merge(
    folder: Annotated[Path, typer.Argument(help="Compressed base, which is not modified.")],
    adapter: Annotated[Path, typer.Option(help="Adapter trained on the base.")],
    to: To,
    *,
    reencode: Annotated[
        bool,
        typer.Option("--reencode", help="Compress the merged model again, with the settings of the base."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    context: Context = 512,
    windows: Windows = 0,
    dtype: DenseDtype = "bfloat16",
    run: RunOptions,
) -> None:
    """Merge an adapter into its base and write a dense model, or with --reencode a compressed one."""
    show = run.output()
    run.setup()
    from pocketllm import merge as merge_adapter

    with show.bars() as bars:
        done = merge_adapter(
            folder,
            adapter,
            to,
            reencode=reencode,
            text=text,
            context=context,
            windows=windows or None,
            dtype=dtype_of(dtype),
            device=run.device,
            progress=bars.on_event,
            trust_remote_code=run.trust_remote_code,
        )
    values = dataclasses.asdict(done)
    show.result(values, result_table(values, f"{folder} + {adapter} -> {to}"))
