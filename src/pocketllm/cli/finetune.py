"""`pocketllm finetune` and `merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.options import Device, Json, Quiet, Seed, Threads, Trust, dtype_of, settle
from pocketllm.cli.render import Output, number, size
from pocketllm.config import DistillConfig, LoopConfig, LoraTuneConfig
from pocketllm.errors import ConfigError

app = typer.Typer()


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


_DISTILL_ONLY = {"teacher", "teacher_on_disk", *_fields(DistillConfig) - _fields(LoraTuneConfig)}
_DISTILL_ONLY -= {"validation_windows"}  # lora has the option, too, for its items
_LORA_ONLY = _fields(LoraTuneConfig) - _fields(DistillConfig)


@app.command(
    epilog="Examples:\n\n  pocketllm finetune smol-2bit -o smol-2bit-tuned --text my-texts/\n\n"
    "  pocketllm finetune smol-2bit -o tuned --text a.txt --text b.jsonl --steps 100 --dry-run\n\n"
    "  pocketllm finetune smol-2bit -o smol-adapter --method lora --text alpaca.json\n\n"
    "  accelerate launch --no-python pocketllm finetune big-2bit -o tuned --device cuda --text my-texts/"
)
def finetune(
    folder: Annotated[Path, typer.Argument(help="A compressed model; it is only read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    method: Annotated[
        str,
        typer.Option(
            help="distill: tune the compressed form itself towards the dense model, no byte is added. "
            "lora: train an adapter beside the frozen base."
        ),
    ] = "distill",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on: file, folder, JSON lines; repeatable. None takes Python's own."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows or instructions per step.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="As many at once, to save memory; gradients add up. 0 takes all.")
    ] = None,
    validation_windows: Annotated[
        int | None, typer.Option(help="Windows or instructions kept for validation.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one; 0 never.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="distill: the dense model; the default is the one that was compressed.")
    ] = None,
    teacher_on_disk: Annotated[
        bool | None,
        typer.Option("--teacher-on-disk", help="distill: read its blocks from disk whenever it is run."),
    ] = None,
    teacher_top_k: Annotated[
        int | None,
        typer.Option(help="distill: compute the teacher's k most likely tokens once; 0 runs it each step."),
    ] = None,
    label_weight: Annotated[
        float | None,
        typer.Option(help="distill: weight of the text's own next token in the loss, 0 to 1."),
    ] = None,
    validation_text: Annotated[
        str | None, typer.Option(help="distill: validate on this instead of a part of the training text.")
    ] = None,
    lr_codebook: Annotated[float | None, typer.Option(help="distill: learning rate of codebooks.")] = None,
    lr_decoder: Annotated[float | None, typer.Option(help="distill: of decoders.")] = None,
    lr_scale: Annotated[float | None, typer.Option(help="distill: of row scales, relative.")] = None,
    lr_norm: Annotated[float | None, typer.Option(help="distill: of norms and biases, relative.")] = None,
    lr_dense: Annotated[
        float | None,
        typer.Option(help="distill: of matrices that are stored dense, relative; 0 leaves them as they are."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lora: rank of the adapter.")] = None,
    alpha: Annotated[int | None, typer.Option(help="lora: its scale is alpha / rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="lora: dropout of its inputs.")] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="lora: names of layers, repeatable; all-linear is the default.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="lora: passes over the text, if not --steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="lora: learning rate.")] = None,
    mode: Annotated[str | None, typer.Option(help="lora: hold the base dense (fast) or packed.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run made.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Get the accuracy of a compressed model back. Killed and started again, it goes on where it was."""
    given = _given(**{k: v for k, v in locals().items() if k not in _COMMON})
    loop = {key: given.pop(key) for key in list(given) if key in LoopConfig.__dataclass_fields__}
    if method not in ("distill", "lora"):
        raise ConfigError(f"--method: got {method!r}, wanted distill or lora")
    wrong = sorted(given.keys() & (_LORA_ONLY if method == "distill" else _DISTILL_ONLY))
    if wrong:
        raise ConfigError(
            f"--{wrong[0].replace('_', '-')} has no meaning with --method {method}; leave it out"
        )
    given["texts"] = tuple(given.pop("text", ()))
    show = Output(json, quiet)
    settle(device, threads)
    from accelerate import PartialState

    show.quiet = show.quiet or not PartialState(cpu=device == "cpu").is_main_process
    common = {"device": device, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    run = _distill if method == "distill" else _lora
    with show.bars() as bars:
        values = run(
            (folder, output),
            given,
            {**loop, "seed": seed},
            dry_run,
            {**common, "progress": lambda event: bars.update(event.stage, event.share, event.detail)},
        )
    if not PartialState(cpu=device == "cpu").is_main_process:
        return
    title = f"plan for {folder} (nothing was trained)" if dry_run else f"{folder} -> {output}"
    show.result(values, _table(values, title))


_COMMON = {
    *("folder", "output", "method", "dry_run", "overwrite", "seed", "device", "threads", "json", "quiet"),
    "trust_remote_code",
}


def _distill(
    folders: tuple[Path, Path],
    given: dict[str, Any],
    loop: dict[str, Any],
    dry_run: bool,
    common: dict[str, Any],
) -> dict[str, Any]:
    from pocketllm.recover.distill import distill, dry_run_distill

    teacher, on_disk = given.pop("teacher", None), given.pop("teacher_on_disk", False)
    config = DistillConfig(**given, loop=dataclasses.replace(DistillConfig().loop, **loop))
    if dry_run:
        output = {"output": folders[1], "overwrite": common["overwrite"]}
        return dry_run_distill(folders[0], config, teacher, common["trust_remote_code"], **output)
    return dataclasses.asdict(distill(*folders, config, teacher=teacher, teacher_on_disk=on_disk, **common))


def _lora(
    folders: tuple[Path, Path],
    given: dict[str, Any],
    loop: dict[str, Any],
    dry_run: bool,
    common: dict[str, Any],
) -> dict[str, Any]:
    from pocketllm.recover.lora import dry_run_lora, lora

    if "validation_windows" in given:
        given["validation_items"] = given.pop("validation_windows")
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    config = LoraTuneConfig(**given, loop=dataclasses.replace(LoraTuneConfig().loop, **loop))
    if dry_run:
        output = {"output": folders[1], "overwrite": common["overwrite"]}
        return dry_run_lora(folders[0], config, common["trust_remote_code"], **output)
    return dataclasses.asdict(lora(*folders, config, **common))


@app.command(
    epilog="Examples:\n\n  pocketllm merge smol-2bit --adapter smol-adapter --to smol-merged\n\n"
    "  pocketllm merge smol-2bit --adapter smol-adapter --to smol-2bit-b --reencode --text wiki.valid.raw"
)
def merge(
    folder: Annotated[Path, typer.Argument(help="The compressed base; it is only read.")],
    adapter: Annotated[Path, typer.Option(help="An adapter trained on it.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    reencode: Annotated[
        bool,
        typer.Option("--reencode", help="Compress the merged model again, with the settings of the base."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per window of it.")] = 512,
    windows: Annotated[int, typer.Option(help="First windows of it; 0 takes all.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the dense weights: bfloat16, float16, float32.")
    ] = "bfloat16",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Put an adapter into its base: one dense model, or one that is compressed again."""
    show = Output(json, quiet)
    settle(device, threads)
    from pocketllm.recover.merge import merge as put_together

    with show.bars() as bars:
        done = put_together(
            folder,
            adapter,
            to,
            reencode=reencode,
            text=text,
            context=context,
            windows=windows or None,
            dtype=dtype_of(dtype),
            device=device,
            progress=lambda event: bars.update(event.stage, event.share, event.detail),
            trust_remote_code=trust_remote_code,
        )
    values = dataclasses.asdict(done)
    show.result(values, _table(values, f"{folder} + {adapter} -> {to}"))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def _table(values: dict[str, Any], title: str) -> Any:
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for key, value in values.items():
        if value in ("", {}):
            continue
        shown = number(value) if isinstance(value, float) else str(value)
        if isinstance(value, dict):
            shown = "\n".join(f"{name}: {_shown(part)}" for name, part in value.items())
        if key.endswith("bytes") or key.startswith("bytes"):
            shown = size(value)
        table.add_row(key.replace("_", " ").replace("kl ", "KL to the dense model, "), shown)
    return table


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)
