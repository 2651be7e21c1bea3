"""`pocketllm demo`: compress, recover, load back, compare with the dense model, generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.compress import PRESETS_HELP
from pocketllm.cli.measured import Text, perplexity_table
from pocketllm.cli.options import Json, Quiet, Threads, load_any, settle
from pocketllm.cli.render import Output, kinds_table, summary_table
from pocketllm.cli.settings import compress_config
from pocketllm.config import DEMO_RECOVERY, DEMO_TOKENS, CompressConfig, DistillConfig
from pocketllm.errors import SourceError

app = typer.Typer()
Progress = Callable[[str, float, str], None]


@app.command(epilog="Example:\n\n  pocketllm demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the compressed model goes.")] = Path(
        "pocketllm-demo"
    ),
    model: Annotated[str, typer.Option(help="Model to compress.")] = "builtin:smollm2-135m",
    preset: Annotated[str | None, typer.Option(help=PRESETS_HELP)] = None,
    bpw: Annotated[float | None, typer.Option(help="Stored bits per weight, instead of a preset.")] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Minimize the error of the weights alone.")
    ] = False,
    recover_steps: Annotated[
        int, typer.Option(min=0, help="Steps of distillation afterwards; 0 leaves it out.")
    ] = DEMO_RECOVERY.steps,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The three primary colors are",
    context: Annotated[int, typer.Option(min=2, help="Tokens per window to measure on.")] = 1024,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows to measure on, or as many as the text has.")
    ] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model there.")] = False,
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress the built-in model, recover it, measure it beside the dense one, and let it write a sentence."""
    show = Output(json, quiet)
    config = compress_config(preset, bpw, without_calibration=no_calibration)
    if config.calibration is not None:
        shorter = dataclasses.replace(config.calibration, tokens=DEMO_TOKENS)
        config = dataclasses.replace(config, calibration=shorter)
    settle(threads=threads)
    with show.bars() as bars:
        text = demo_text(model, context, windows, bars.update)
        values = run_demo(model, config, output, prompt, text, recover_steps, bars.update, overwrite)
    report = values["report"]
    titles = ("dense", "compressed", *(["recovered"] if recover_steps else []))
    measured: dict[str, Any] = {title: values[title] for title in titles}
    show.result(
        values,
        kinds_table(report),
        summary_table(report, values["output"]),
        perplexity_table(text, measured),
        f"> {values['text']}",
    )


def demo_text(model: str, context: int, windows: int, progress: Progress) -> Text:
    """What is measured on: as many windows as the text has, at most those wanted.

    Raises:
        ConfigError: the text has none. SourceError: no model, or no tokenizer. Both before anything is done.
    """
    from pocketllm.source.dense_checkpoint import resolve
    from pocketllm.source.folder import read_tokenizer
    from pocketllm.text.read import evaluation_text
    from pocketllm.text.windows import token_windows

    folder = resolve(model, lambda message: progress("fetch", 0.0, message))
    tokenizer = read_tokenizer(folder, trust_remote_code=False)
    if tokenizer is None:
        raise SourceError(f"{folder}: holds no tokenizer, which the demo needs; add its files")
    name, text = evaluation_text()
    return Text(name, text, context, min(windows, len(token_windows(tokenizer, text, context))))


def run_demo(
    model: str,
    config: CompressConfig,
    output: Path,
    prompt: str,
    text: Text,
    recover_steps: int,
    progress: Progress,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Everything the demo shows, as plain values. recover_steps: 0 leaves recovery out."""
    from pocketllm.evaluate.generate import generate
    from pocketllm.format.checkpoint import read_report

    folders = {"dense": model, "compressed": str(_compressed(model, config, output, progress, overwrite))}
    if recover_steps:
        recovery = dataclasses.replace(DEMO_RECOVERY, steps=recover_steps)
        folders["recovered"] = str(_recovered(model, recovery, output, progress))
    values: dict[str, Any] = {
        "text_name": text.name,
        "context": text.context,
        "output": list(folders.values())[-1],
    }
    values |= {title: text.measure(title, folder, progress) for title, folder in folders.items()}
    last = list(folders.values())[-1]
    loaded, tokenizer, _ = load_any(last, "dense", "auto", "cpu", False)
    written = generate(loaded, tokenizer, prompt)
    values["text"] = written.text
    values["tokens_per_second"] = written.tokens_per_second
    values["report"] = read_report(Path(last))
    return values


def _compressed(
    model: str, config: CompressConfig, output: Path, progress: Progress, overwrite: bool
) -> Path:
    """The compressed model, made unless it is there already."""
    from pocketllm.compression.pipeline import compress, is_made
    from pocketllm.format.checkpoint import verify

    if is_made(output, model, config):
        verify(output)
        progress("compress", 1.0, f"{output} is there already")
    else:
        compress(
            model,
            config,
            output,
            progress=lambda event: progress(event.stage, event.share, event.detail),
            overwrite=overwrite,
        )
    return output


def _recovered(model: str, recovery: DistillConfig, base: Path, progress: Progress) -> Path:
    """Its recovered form beside it, made unless it is there already."""
    import pocketllm
    from pocketllm.format.checkpoint import REPORT_NAME, read_report, verify
    from pocketllm.recover.base_model import identity

    output = base.with_name(base.name + "-recovered")
    if (output / REPORT_NAME).is_file():
        facts = read_report(output).get("recover", {})
        wanted = (identity(read_report(base)), recovery.to_dict())
        if (facts.get("base"), facts.get("config")) == wanted:
            verify(output)
            progress("train", 1.0, f"{output} is there already")
            return output
    pocketllm.distill(
        base,
        output,
        recovery,
        teacher=model,
        overwrite=True,
        progress=lambda event: progress(event.stage, event.share, event.detail),
    )
    return output
