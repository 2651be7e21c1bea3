"""`pocketllm finetune` and `merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.options import Device, Json, Quiet, Seed, Threads, Trust, settle
from pocketllm.cli.render import Output, size
from pocketllm.config import DistillConfig, LoopConfig
from pocketllm.errors import ConfigError

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm finetune smol-2bit -o smol-2bit-tuned --text my-texts/\n\n"
    "  pocketllm finetune smol-2bit -o tuned --text a.txt --text b.jsonl --steps 100 --dry-run\n\n"
    "  accelerate launch --no-python pocketllm finetune big-2bit -o tuned --device cuda --text my-texts/"
)
def finetune(
    folder: Annotated[Path, typer.Argument(help="A compressed model; it is only read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    method: Annotated[
        str, typer.Option(help="distill: tune the compressed form itself, no byte is added.")
    ] = "distill",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to train on: file, folder or JSON lines; repeatable. None takes Python's own."
        ),
    ] = None,
    validation_text: Annotated[
        Path | None, typer.Option(help="Text to validate on, instead of a part of the training text.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model; the default is the one that was compressed.")
    ] = None,
    teacher_top_k: Annotated[
        int | None, typer.Option(help="Compute the teacher's k most likely tokens once; 0 runs it each step.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows at once, to save memory; gradients add up. 0 takes all.")
    ] = None,
    lr_codebook: Annotated[float | None, typer.Option(help="Learning rate of codebooks.")] = None,
    lr_decoder: Annotated[float | None, typer.Option(help="Learning rate of decoders.")] = None,
    lr_scale: Annotated[float | None, typer.Option(help="Learning rate of row scales, relative.")] = None,
    lr_norm: Annotated[float | None, typer.Option(help="Learning rate of norms and biases.")] = None,
    validation_windows: Annotated[int | None, typer.Option(help="Windows to validate on.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one; 0 never.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model there.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Get the accuracy of a compressed model back. Killed and started again, it goes on where it was."""
    show = Output(json, quiet)
    if method != "distill":
        raise ConfigError(f"--method: got {method!r}, wanted distill")
    loop = _given(
        batch_size=batch_size,
        micro_batch=micro_batch,
        eval_every=eval_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        seed=seed,
    )
    changes = _given(
        steps=steps,
        context=context,
        texts=tuple(map(str, text)) if text else None,
        validation_text=None if validation_text is None else str(validation_text),
        validation_windows=validation_windows,
        teacher_top_k=teacher_top_k,
        lr_codebook=lr_codebook,
        lr_decoder=lr_decoder,
        lr_scale=lr_scale,
        lr_norm=lr_norm,
    )
    config = DistillConfig(**changes, loop=LoopConfig(**loop))
    settle(device, threads)
    from pocketllm.recover.distill import distill, dry_run_distill

    if dry_run:
        facts = dry_run_distill(folder, config, teacher, trust_remote_code)
        show.result(facts, _table(facts, f"plan for {folder} (nothing was trained)"))
        return
    with show.bars() as bars:
        done = distill(
            folder,
            output,
            config,
            teacher=teacher,
            progress=lambda event: bars.update(event.stage, event.share, event.detail),
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    values = dataclasses.asdict(done)
    show.result(values, _table(values, f"{folder} -> {output}"))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def _table(values: dict[str, Any], title: str) -> Any:
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for key, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        if isinstance(value, dict):
            shown = "\n".join(f"{name}: {_number(part)}" for name, part in value.items())
        if key.endswith("bytes") or key.startswith("bytes"):
            shown = size(value)
        table.add_row(key.replace("_", " ").replace("kl ", "KL to the dense model, "), shown)
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
