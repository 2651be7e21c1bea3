"""`pocketllm bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output, size
from pocketllm.cli.shared_options import Json, Quiet, Threads, Trust

if TYPE_CHECKING:
    from pocketllm.evaluate import BenchRun

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm bench smol-2bit --against builtin:smollm2-135m\n\n"
    "  pocketllm bench smol-2bit smol-3bit --mode packed,dense --threads 1 --json"
)
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Compressed models.")],
    against: Annotated[str | None, typer.Option(help="Dense model: folder, Hub id or builtin:….")] = None,
    mode: Annotated[
        str, typer.Option(help="Modes to run each model in: packed, dense, auto, separated by commas.")
    ] = "packed,dense",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after a prompt of one token.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes for each model and mode; medians are shown.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure speed and memory, each model and mode in a process of its own."""
    from pocketllm.evaluate import BenchConfig, bench as measure

    show = Output(json, quiet)
    setup_process(threads=threads)
    config = BenchConfig(prompt_tokens, new_tokens, threads, rounds, dtype, trust_remote_code)
    modes = [part.strip() for part in mode.split(",")]
    with show.bars() as bars:
        runs = measure(models, modes, config, against, lambda share, what: bars.update("bench", share, what))
    show.result({"runs": [dataclasses.asdict(run) for run in runs]}, speed_table(runs))


def speed_table(runs: Sequence[BenchRun]) -> Any:
    """Speed and memory of each run."""
    from rich.table import Table

    table = Table(title=f"{runs[0].dtype}, {runs[0].threads} threads")
    for header in ("model", "mode", "load, s", "prompt, tokens/s", "tokens/s", "peak memory", "weights"):
        table.add_column(header, justify="left" if header in ("model", "mode") else "right")
    for run in runs:
        speeds = (run.load_seconds, run.prompt_tokens_per_second, run.tokens_per_second)
        memory = (size(run.peak_memory_bytes), size(run.weights_bytes))
        table.add_row(run.model, run.mode, *(f"{value:,.1f}" for value in speeds), *memory)
    return table
