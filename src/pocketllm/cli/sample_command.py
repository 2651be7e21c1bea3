"""`pocketllm sample`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.option_groups import LoadOptions, RunOptions, with_groups
from pocketllm.cli.shared_options import Overwrite, Runnable, Seed
from pocketllm.config import SampleConfig

app = typer.Typer()


@app.command(
    epilog="Example:\n\n  pocketllm sample ./my-model -o own.jsonl\n\n"
    "  pocketllm compress ./my-model -o small --calibration own.jsonl"
)
@with_groups
def sample(
    model: Runnable,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, JSON lines.")],
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least.")] = SampleConfig.tokens,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = SampleConfig.length,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = SampleConfig.batch,
    temperature: Annotated[
        float, typer.Option(help="1 keeps the model's own distribution.")
    ] = SampleConfig.temperature,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    how: LoadOptions,
    run: RunOptions,
) -> None:
    """Write text that a model makes up, to calibrate on where there is no text like its future inputs."""
    from pocketllm.evaluate import check_free, sample_texts

    show = run.output()
    run.setup()
    config = SampleConfig(tokens, length, batch, temperature, seed)
    check_free(output, overwrite)
    loaded, tokenizer, facts = how.load(model, run)
    with show.bars() as bars:
        identity = repr((model, how, run.device, facts["bytes_on_disk"]))
        texts = sample_texts(
            *(loaded, tokenizer, output, config, identity),
            on_progress=lambda share: bars.update("sample", share, str(output)),
            overwrite=overwrite,
        )
    show.result(
        {"output": str(output), "texts": texts, "model": model, **asdict(config)}, f"{output}: {texts} texts"
    )
