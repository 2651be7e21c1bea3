"""`pocketllm compress`, `info`, `export` and `demo`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.options import Device, Json, Quiet, Seed, Threads, Trust, dtype_of, settle
from pocketllm.cli.render import Output, kinds_table, size, skipped_table, summary_table
from pocketllm.cli.settings import compress_config, parse_overrides, recovery, with_calibration
from pocketllm.config import PRESETS, CompressConfig, DistillConfig

app = typer.Typer()

_PRESETS_HELP = "; ".join(f"{name}: {entry.summary}" for name, entry in PRESETS.items())


@app.command(
    epilog="Examples:\n\n  pocketllm compress builtin:smollm2-135m -o smol-8x\n\n"
    "  pocketllm compress ./my-model -o small --bpw 3 --dry-run\n\n"
    "  pocketllm compress ./my-model -o small --size 60MB --calibration my-texts/\n\n"
    "  pocketllm compress ./my-model -o small --ratio 6 --override '*.v_proj.weight=5' --refine\n\n"
    "  pocketllm compress owner/name -o small --preset paper-16x --json"
)
def compress(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or builtin:smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    preset: Annotated[str | None, typer.Option(help=_PRESETS_HELP)] = None,
    bpw: Annotated[
        float | None, typer.Option(help="Stored bits per weight over the compressed matrices, all counted.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="How many times smaller than the bf16 checkpoint, whole folder.")
    ] = None,
    nbytes: Annotated[
        str | None, typer.Option("--size", help="Bytes of the whole output folder, as 30MB or 30MiB.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate on: file, folder, or OWNER/NAME[:CONFIG[:SPLIT]] on the hub; repeatable."
        ),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens of it that are used.")] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Minimize the error of the weights alone.")
    ] = False,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what calibration measures, for other targets of the same model and text."
        ),
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--no-sequential",
            help="Code each block for the inputs that the compressed blocks before it make (default), "
            "or for those of the dense model.",
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--no-refine", help="Tune each coded block to what the dense one computes."),
    ] = None,
    passes: Annotated[
        int | None, typer.Option(help="Passes of coordinate descent over the indices of each matrix.")
    ] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Rotate both sides of each matrix (default).")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS",
            help="Bits per weight of the matrices whose name fits, as 'model.layers.0.*=4'; 16 leaves them "
            "dense; the last that fits counts; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan and exact sizes, fit nothing.")
    ] = False,
    keep_embeddings: Annotated[
        bool | None, typer.Option("--keep-embeddings", help="Leave embedding and head dense.")
    ] = None,
    dense_first: Annotated[int | None, typer.Option(help="Blocks left dense at the start.")] = None,
    dense_last: Annotated[int | None, typer.Option(help="Blocks left dense at the end.")] = None,
    vector_len: Annotated[int | None, typer.Option(help="Weights per index (d).")] = None,
    codebook_size: Annotated[
        int | None, typer.Option(help="Codewords (K); with --vector-len, instead of --bpw.")
    ] = None,
    codebook_scope: Annotated[str | None, typer.Option(help="auto, matrix, kind or model.")] = None,
    decoder_scope: Annotated[str | None, typer.Option(help="matrix, kind or model.")] = None,
    decoder: Annotated[str | None, typer.Option(help="row (published) or lookup.")] = None,
    norm: Annotated[str | None, typer.Option(help="rln (published), ln or none.")] = None,
    init: Annotated[str | None, typer.Option(help="kmeans, or normal (published).")] = None,
    loss: Annotated[str | None, typer.Option(help="mse or rmse.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the MLP blocks; 0: affine maps.")] = None,
    depth: Annotated[int | None, typer.Option(help="Number of MLP blocks; 0: no networks.")] = None,
    vq_weight: Annotated[float | None, typer.Option(help="Weight of the VQ loss (lambda).")] = None,
    commitment_weight: Annotated[float | None, typer.Option(help="Weight of the commitment loss.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Training passes over the sample.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Subvectors per training step.")] = None,
    row_scale: Annotated[bool | None, typer.Option(help="Store a scale per matrix row.")] = None,
    recover: Annotated[
        str | None, typer.Option(help="distill: get accuracy back afterwards, see `pocketllm finetune`.")
    ] = None,
    recover_text: Annotated[
        list[Path] | None,
        typer.Option(help="Text for that; repeatable. The default is the calibration text."),
    ] = None,
    recover_steps: Annotated[int | None, typer.Option(help="Steps of that.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model there.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compress a model: plan, fit, encode, pack, write. Killed and started again, it goes on where it was."""
    show = Output(json, quiet)
    config = compress_config(
        preset,
        bpw,
        ratio,
        nbytes,
        no_calibration,
        keep_embeddings=keep_embeddings,
        dense_first=dense_first,
        dense_last=dense_last,
        vector_len=vector_len,
        codebook_size=codebook_size,
        codebook_scope=codebook_scope,
        decoder_scope=decoder_scope,
        decoder=decoder,
        norm=norm,
        init=init,
        loss=loss,
        hidden=hidden,
        depth=depth,
        vq_weight=vq_weight,
        commitment_weight=commitment_weight,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        row_scale=row_scale,
        overrides=parse_overrides(override),
        seed=seed,
    )
    config = with_calibration(
        config,
        no_calibration,
        calibration,
        calibration_tokens,
        refine,
        passes=passes,
        rotate=rotate,
        sequential=sequential,
    )
    recovers = recovery(recover, recover_text, recover_steps, config)
    settle(device, threads)
    import pocketllm

    with show.bars() as bars:
        how: dict[str, Any] = {
            "progress": lambda event: bars.update(event.stage, event.share, event.detail),
            "device": device,
            "trust_remote_code": trust_remote_code,
            "calibration_folder": calibration_cache,
        }
        if dry_run:
            done = pocketllm.dry_run(model, config, **how)
        else:
            run = pocketllm.compress if recovers is None else partial(_recovered, recovers)
            done = run(model, config, output, overwrite=overwrite, **how)
    report = done.to_dict()
    if dry_run:
        title = f"plan for {model} (nothing was fitted)"
        show.result(report, summary_table(report, title), kinds_table(report), skipped_table(report))
        return
    show.result(report, kinds_table(report), summary_table(report, f"{model} -> {output}"))


def _recovered(recovery: DistillConfig, model: str, config: CompressConfig, output: Path, **how: Any) -> Any:
    """Compress and distill; the report of the result."""
    from pocketllm.recover.chain import compress_and_distill

    report, _ = compress_and_distill(model, config, recovery, output, **how)
    return report


@app.command(epilog="Example:\n\n  pocketllm info smol-8x --json")
def info(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    check: Annotated[bool, typer.Option(help="Verify every file's checksum.")] = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sizes, ratios and errors of a compressed model, and whether its files are whole."""
    from pocketllm.model.checkpoint import read_report, verify
    from pocketllm.model.report import RUN_FACTS

    report = {**dict.fromkeys(RUN_FACTS), **read_report(folder)}
    if check:
        verify(folder)
    title = f"{folder}" + (" (all checksums good)" if check else "")
    Output(json, quiet).result(
        report, summary_table(report, title), kinds_table(report), skipped_table(report)
    )


@app.command(epilog="Example:\n\n  pocketllm export smol-8x --to smol-dense --dtype bfloat16")
def export(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Decode into a dense safetensors model that any tool reads."""
    from pocketllm.model.export import export as decode

    show = Output(json, quiet)
    settle()
    nbytes = decode(folder, to, dtype_of(dtype), trust_remote_code)
    show.result({"output": str(to), "bytes_on_disk": nbytes, "dtype": dtype}, f"{to}: {size(nbytes)}")


@app.command(epilog="Example:\n\n  pocketllm demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the compressed model goes.")] = Path(
        "pocketllm-demo"
    ),
    model: Annotated[str, typer.Option(help="Model to compress.")] = "builtin:smollm2-135m",
    preset: Annotated[str | None, typer.Option(help=_PRESETS_HELP)] = None,
    bpw: Annotated[float | None, typer.Option(help="Stored bits per weight, instead of a preset.")] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Minimize the error of the weights alone.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The three primary colors are",
    context: Annotated[int, typer.Option(min=2, help="Tokens per window to measure on.")] = 1024,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows to measure on, or as many as the text has.")
    ] = 8,
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress the built-in model, measure it beside the dense one, and let it write a sentence."""
    from pocketllm.cli.demo import run_demo

    show = Output(json, quiet)
    config = compress_config(preset, bpw, without_calibration=no_calibration)
    settle(threads=threads)
    with show.bars() as bars:
        values = run_demo(model, config, output, prompt, (context, windows), bars.update)
    show.result(values, *_demo_tables(values))


def _demo_tables(values: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    table = Table(title=f"perplexity on {values['text_name']}, context {values['context']}")
    for header in ("model", "bytes on disk", "perplexity"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name in ("dense", "compressed"):
        entry = values[name]
        table.add_row(name, size(entry["bytes_on_disk"]), f"{entry['perplexity']:.2f}")
    report = values["report"]
    return [kinds_table(report), summary_table(report, values["output"]), table, f"> {values['text']}"]
