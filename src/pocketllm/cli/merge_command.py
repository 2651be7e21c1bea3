"""`pocketllm merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.model_loading import dtype_of
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output
from pocketllm.cli.result_table import result_table
from pocketllm.cli.shared_options import Device, Json, Quiet, Threads, Trust

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm merge smol-2bit --adapter smol-adapter --to smol-merged\n\n"
    "  pocketllm merge smol-2bit --adapter smol-adapter --to smol-2bit-b --reencode --text wiki.valid.raw"
)
def merge(
    folder: Annotated[Path, typer.Argument(help="Compressed base, which is not modified.")],
    adapter: Annotated[Path, typer.Option(help="Adapter trained on the base.")],
    to: Annotated[Path, typer.Option(help="Folder to create.")],
    reencode: Annotated[
        bool,
        typer.Option("--reencode", help="Compress the merged model again, with the settings of the base."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per window of that text.")] = 512,
    windows: Annotated[int, typer.Option(help="Number of windows; 0 takes all.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Type of the dense weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Merge an adapter into its base and write a dense model, or with --reencode a compressed one."""
    show = Output(json, quiet)
    setup_process(device, threads)
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
            device=device,
            progress=bars.on_event,
            trust_remote_code=trust_remote_code,
        )
    values = dataclasses.asdict(done)
    show.result(values, result_table(values, f"{folder} + {adapter} -> {to}"))
