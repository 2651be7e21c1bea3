"""`pocketllm compress`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.options import Context, Device, Json, Ppl, Quiet, Seed, Threads, Trust, Windows, settle
from pocketllm.cli.render import Output, kinds_table, skipped_table, summary_table
from pocketllm.cli.settings import compress_config, parse_overrides, recovery, with_calibration
from pocketllm.config import PRESETS, CompressConfig, DistillConfig, EvalConfig
from pocketllm.errors import ConfigError

if TYPE_CHECKING:
    from pocketllm.format.report import Report

app = typer.Typer()

PRESETS_HELP = "; ".join(f"{name}: {entry.summary}" for name, entry in PRESETS.items())


@app.command(
    epilog="Examples:\n\n  pocketllm compress builtin:smollm2-135m -o smol-8x\n\n"
    "  pocketllm compress ./my-model -o small --bpw 3 --dry-run\n\n"
    "  pocketllm compress ./my-model -o small --size 60MB --calibration my-texts/\n\n"
    "  pocketllm compress ./my-model -o small --ratio 6 --override '*.v_proj.weight=5' --refine\n\n"
    "  pocketllm compress owner/name -o small --preset paper-16x --json\n\n"
    "  pocketllm compress ./my-model -o small --bpw 2.5 --recover distill --recover-text my-texts/ --ppl test.txt"
)
def compress(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or builtin:smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    preset: Annotated[str | None, typer.Option(help=PRESETS_HELP)] = None,
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
        int | None, typer.Option(help="Passes of coordinate descent over the indices; with --one-sided.")
    ] = None,
    weigh_tokens: Annotated[
        bool | None,
        typer.Option(
            "--weigh-tokens/--no-weigh-tokens",
            help="Weigh the inputs of a layer by the loss's gradients where few tokens have most (default).",
        ),
    ] = None,
    two_sided: Annotated[
        bool | None,
        typer.Option(
            "--two-sided/--one-sided",
            help="Weigh errors by the loss's gradients at a layer's outputs, too (default), or by its "
            "inputs alone.",
        ),
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
    codebook_source: Annotated[
        str | None, typer.Option(help="fit, or seed: drawn from a seed, so that none is stored.")
    ] = None,
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
    ppl: Ppl = None,
    context: Context = EvalConfig.context,
    windows: Windows = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model there.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compress a model: plan, fit, encode, pack, write. Killed and started again, it goes on where it was.

    With --recover its accuracy is got back, and with --ppl all that is made is measured beside the dense model.
    """
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
        codebook_source=codebook_source,
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
        weigh_tokens=weigh_tokens,
        two_sided=two_sided,
        rotate=rotate,
        sequential=sequential,
    )
    recovers = recovery(recover, recover_text, recover_steps, config)
    if windows < 0:
        raise ConfigError(f"--windows: got {windows}, wanted 0 (all) or more")
    settle(device, threads)
    import pocketllm
    from pocketllm.cli.measured import Text, perplexity_table
    from pocketllm.format.checkpoint import read_report
    from pocketllm.recover.compress_then_distill import check_recovery
    from pocketllm.text.read import read_text

    text = None if ppl is None else Text(str(ppl), read_text(ppl), context, windows or None)
    found: dict[str, Any] = {}
    with show.bars() as bars:

        def measure(title: str, which: str | Path) -> None:
            if text is not None:
                found[title] = text.measure(title, which, bars.update, device, trust_remote_code)

        how: dict[str, Any] = {
            "progress": lambda event: bars.update(event.stage, event.share, event.detail),
            "device": device,
            "trust_remote_code": trust_remote_code,
            "calibration_folder": calibration_cache,
        }
        if dry_run:
            if recovers is not None:
                check_recovery(model, recovers, trust_remote_code)
            done = pocketllm.dry_run(model, config, **how)
        else:
            measure("dense", model)
            done = _chain(recovers, measure)(model, config, output, overwrite=overwrite, **how)
    report = done.to_dict()
    if dry_run:
        title = f"plan for {model} (nothing was fitted)"
        show.result(report, summary_table(report, title), kinds_table(report), skipped_table(report))
        return
    if recovers is not None:
        report["recover"] = read_report(output)["recover"]
    if text is not None:
        report["measured"] = found
    tables = [kinds_table(report), summary_table(report, f"{model} -> {output}")]
    show.result(report, *tables, *([] if text is None else [perplexity_table(text, found)]))


def _chain(recovery: DistillConfig | None, made: Callable[[str, Path], None]) -> Callable[..., Report]:
    """Compress, or compress and distill; calls `made` with each finished model, returns its report."""
    from pocketllm.compression.pipeline import compress
    from pocketllm.recover.compress_then_distill import compress_and_distill

    def run(model: str, config: CompressConfig, output: Path, **how: Any) -> Report:
        if recovery is not None:
            return compress_and_distill(model, config, recovery, output, made=made, **how)[0]
        report = compress(model, config, output, **how)
        made("compressed", output)
        return report

    return run
