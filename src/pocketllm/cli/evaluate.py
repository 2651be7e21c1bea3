"""`pocketllm eval` and `generate`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.options import (
    Adapter,
    Device,
    Dtype,
    Json,
    Mode,
    Quiet,
    Seed,
    Threads,
    Trust,
    dtype_of,
    load_any,
    settle,
)
from pocketllm.cli.render import Output
from pocketllm.config import EvalConfig
from pocketllm.errors import ConfigError, SourceError

app = typer.Typer()


@app.command(
    name="eval",
    epilog="Examples:\n\n  pocketllm eval smol-8x --ppl wiki.test.raw --context 1024 --windows 16\n\n"
    "  pocketllm eval smol-8x --against builtin:smollm2-135m --ppl wiki.test.raw\n\n"
    "  pocketllm eval smol-8x --against builtin:smollm2-135m --tasks piqa,arc_easy --data ./data --limit 400",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed model; a dense one works, too.")],
    adapter: Adapter = None,
    ppl: Annotated[Path | None, typer.Option(help="UTF-8 text file to measure perplexity on.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with; with --ppl also KL divergence to it.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks, with commas; `paper`: the paper's five; `local`: all that --data holds."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with local task files; docs/evaluation.md says which. "
            "Default: $POCKETLLM_DATA, and the hub for what it lacks."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="First documents of each task; 0 takes all.")] = 0,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = EvalConfig.context,
    windows: Annotated[int, typer.Option(help="First windows used; 0 takes all.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch of task prompts.")] = (
        EvalConfig.batch_tokens
    ),
    cache: Annotated[bool, typer.Option(help="Take earlier results of a task, and keep new ones.")] = True,
    mode: Mode = "dense",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity, divergence from the dense model, and zero-shot tasks, side by side with the dense model."""
    from pocketllm.cli.eval_tables import eval_tables
    from pocketllm.evaluate.measure import Model, TaskOptions, measure
    from pocketllm.evaluate.tasks import check_installed, task_names
    from pocketllm.source.dense_checkpoint import resolve
    from pocketllm.text.read import read_text

    if ppl is None and tasks is None:
        raise ConfigError("nothing to measure: give --ppl FILE, --tasks NAMES or both")
    for name, number in (("--windows", windows), ("--limit", limit)):
        if number < 0:
            raise ConfigError(f"{name}: got {number}, wanted 0 (all) or more")
    config = EvalConfig(context, windows or None, limit or None, batch_tokens)
    folder = None if tasks is None and data is None else _data(data)
    show = Output(json, quiet)
    text = None if ppl is None else read_text(ppl)
    options = None
    if tasks is not None:
        check_installed()
        names = task_names([name for name in re.split(r"[,\s]+", tasks) if name], folder)
        options = TaskOptions(tuple(names), folder, hub=data is None, cache=cache)
    settle(device, threads)

    def named(name: str, mode: str, adapter: Path | None = None) -> Model:
        setting = f"{dtype_of(dtype, device)}, {mode}, {device}"
        return Model(
            name,
            resolve(name),
            setting,
            lambda: load_any(name, mode, dtype, device, trust_remote_code)[:2],
            None if adapter is None else _adapter(adapter, resolve(name)),
            trust_remote_code,
        )

    other = None if against is None else named(against, "dense")
    with show.bars() as bars:
        values = measure(named(model, mode, adapter), other, text, options, config, bars.update)
    values |= {"text": None if ppl is None else str(ppl), "dtype": str(dtype_of(dtype, device))}
    show.result(values, *eval_tables(values))


def _adapter(adapter: Path, base: Path) -> Any:
    from pocketllm.evaluate.measure import Adapter as Measured
    from pocketllm.recover.adapter import attach_adapter, check_adapter

    check_adapter(adapter, base)
    return Measured(adapter, lambda model: attach_adapter(model, base, adapter))


def _data(given: Path | None) -> Path | None:
    """Folder of local task files: --data, else what the environment names, if anything."""
    named = os.environ.get("POCKETLLM_DATA")
    folder = given or (Path(named) if named else None)
    if folder is not None and not folder.is_dir():
        raise SourceError(f"{'--data' if given else 'POCKETLLM_DATA'}: {folder} is no folder")
    return folder


@app.command(epilog='Example:\n\n  pocketllm generate smol-8x --prompt "The capital of France is"')
def generate(
    model: Annotated[str, typer.Argument(help="A compressed model; a dense one works, too.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    adapter: Adapter = None,
    mode: Mode = "dense",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text with a compressed model."""
    from pocketllm.evaluate.generate import generate as run_model

    show = Output(json, quiet)
    settle(device, threads)
    loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code, adapter)
    found = run_model(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, chat)
    show.result({**dataclasses.asdict(found), **facts, "model": model}, found.text)
    show.note(f"{found.tokens} tokens, {found.tokens_per_second:.1f} tokens per second")
