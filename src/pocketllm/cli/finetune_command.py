"""`pocketllm finetune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.option_groups import RunOptions, with_groups
from pocketllm.cli.removed_options import SettingsCommand
from pocketllm.cli.result_table import result_table
from pocketllm.cli.shared_options import (
    Compressed,
    OutputFolder,
    Overwrite,
    Seed,
    set_option,
)
from pocketllm.config import DistillConfig, FinetuneOptions, LoraTuneConfig
from pocketllm.errors import ConfigError

app = typer.Typer()

Method = Annotated[
    str,
    typer.Option(
        help="distill: tune the compressed form towards the dense model; adds no bytes. "
        "lora: train an adapter on the frozen base."
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        help="Training text: file (text, JSON, JSON lines, parquet) or folder; repeatable. "
        "The default is Python's documentation."
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Dense model, for distill and for lora with --set init=...; the default is the one that was compressed."
    ),
]
TeacherOnDisk = Annotated[
    bool,
    typer.Option(
        "--teacher-on-disk", help="distill: read the teacher's blocks from disk in every forward pass."
    ),
]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        help="distill: folder for the teacher's tokens, computed once for all students of this teacher on this text; "
        "needs --set teacher_top_k=K."
    ),
]
ValidationText = Annotated[
    str | None, typer.Option(help="distill: validate on this text instead of a part of the training text.")
]


@app.command(
    cls=SettingsCommand,
    epilog="Examples:\n\n  pocketllm finetune smol-2bit -o smol-2bit-tuned --text my-texts/\n\n"
    "  pocketllm finetune smol-2bit -o tuned --text a.txt --text b.jsonl --steps 100 --dry-run\n\n"
    "  pocketllm finetune smol-2bit -o tuned --set lr_scale=2e-3 --set loop.batch_size=4\n\n"
    "  pocketllm finetune smol-2bit -o smol-adapter --method lora --text alpaca.json --set rank=16\n\n"
    "  accelerate launch --no-python pocketllm finetune big-2bit -o tuned --device cuda --text my-texts/",
)
@with_groups
def finetune(
    folder: Compressed,
    output: OutputFolder,
    *,
    method: Method = "distill",
    text: Text = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    settings: Annotated[list[str] | None, set_option("finetune")] = None,
    teacher: Teacher = None,
    teacher_on_disk: TeacherOnDisk = False,
    teacher_cache: TeacherCache = None,
    validation_text: ValidationText = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, tokens and bytes; train nothing.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    run: RunOptions,
) -> None:
    """Recover the accuracy of a compressed model. Rerun the command to resume."""
    config = FinetuneOptions(
        method=method,
        texts=tuple(text or ()),
        steps=steps,
        context=context,
        validation_text=validation_text,
        seed=seed,
        settings=tuple(settings or ()),
    ).config()
    teaching = _teaching(method, teacher, teacher_on_disk, teacher_cache)
    show = run.output()
    run.setup()
    from accelerate import PartialState

    is_main = PartialState(cpu=run.device == "cpu").is_main_process
    show.quiet = show.quiet or not is_main
    how = {"overwrite": overwrite, "trust_remote_code": run.trust_remote_code}
    with show.bars() as bars:
        if dry_run:
            values = _plan(folder, config, output=output, **teaching, **how)
        else:
            values = _train(
                folder, output, config, progress=bars.on_event, device=run.device, **teaching, **how
            )
    if is_main:
        title = f"plan for {folder} (nothing was trained)" if dry_run else f"{folder} -> {output}"
        show.result(values, result_table(values, title))


def _teaching(method: str, teacher: str | None, on_disk: bool, cache: Path | None) -> dict[str, Any]:
    """The arguments of a method that are not settings.

    Raises:
        ConfigError: one is given with another method.
    """
    if method == "distill":
        return {"teacher": teacher, "teacher_on_disk": on_disk, "teacher_cache": cache}
    for name, value in (("--teacher-on-disk", on_disk), ("--teacher-cache", cache)):
        if value:
            raise ConfigError(f"{name} does not apply to --method {method}; remove it")
    return {"teacher": teacher}


def _plan(folder: Path, config: DistillConfig | LoraTuneConfig, **how: Any) -> dict[str, Any]:
    from pocketllm.recover import dry_run_distill, dry_run_lora

    for name in ("teacher_on_disk", "teacher_cache"):
        how.pop(name, None)
    if isinstance(config, DistillConfig):
        return dry_run_distill(folder, config, **how)
    return dry_run_lora(folder, config, **how)


def _train(folder: Path, output: Path, config: DistillConfig | LoraTuneConfig, **how: Any) -> dict[str, Any]:
    import pocketllm

    if isinstance(config, DistillConfig):
        return dataclasses.asdict(pocketllm.distill(folder, output, config, **how))
    return dataclasses.asdict(pocketllm.lora(folder, output, config, **how))
