"""`pocketllm eval` and `generate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.options import Device, Dtype, Json, Mode, Quiet, Seed, Threads, Trust, load_any, settle
from pocketllm.cli.render import Output, size
from pocketllm.errors import ConfigError

app = typer.Typer()


@app.command(
    name="eval",
    epilog="Example:\n\n  pocketllm eval smol-8x --ppl wiki.test.raw --context 1024 --windows 16",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed model; a dense one works, too.")],
    ppl: Annotated[Path, typer.Option(help="UTF-8 text file to measure perplexity on.")],
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(help="First windows used; 0 takes all.")] = 0,
    mode: Mode = "dense",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Token perplexity in non-overlapping windows, the convention of the GPTQ and AQLM papers."""
    from pocketllm.evaluate.perplexity import perplexity, read_text

    if windows < 0:
        raise ConfigError(f"--windows: got {windows}, wanted 0 (all) or more")
    show = Output(json, quiet)
    text = read_text(ppl)
    settle(device, threads)
    loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code)
    with show.bars() as bars:
        found = perplexity(
            loaded, tokenizer, text, context, windows or None, lambda share: bars.update("eval", share, model)
        )
    values = {
        **dataclasses.asdict(found),
        **facts,
        "text": str(ppl),
        "model": model,
        "dtype": str(loaded.dtype),
    }
    show.result(
        values,
        f"perplexity {found.perplexity:.3f}   ({ppl.name}, context {found.context}, {found.windows} windows, "
        f"{found.tokens} tokens; {size(facts['bytes_on_disk'])} on disk)",
    )


@app.command(epilog='Example:\n\n  pocketllm generate smol-8x --prompt "The capital of France is"')
def generate(
    model: Annotated[str, typer.Argument(help="A compressed model; a dense one works, too.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
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
    loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code)
    found = run_model(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, chat)
    show.result({**dataclasses.asdict(found), **facts, "model": model}, found.text)
    show.note(f"{found.tokens} tokens, {found.tokens_per_second:.1f} tokens per second")
