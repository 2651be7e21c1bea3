"""`pocketllm generate`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from pocketllm.cli.model_loading import load_any
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import (
    Adapter,
    Device,
    Dtype,
    Json,
    Mode,
    Quiet,
    Runnable,
    Seed,
    Threads,
    Trust,
)

app = typer.Typer()


@app.command(epilog='Example:\n\n  pocketllm generate smol-8x --prompt "The capital of France is"')
def generate(
    model: Runnable,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to generate.")] = 40,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    adapter: Adapter = None,
    mode: Mode = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Generate text with a compressed or dense model."""
    from pocketllm import generate as run_model

    show = Output(json, quiet)
    setup_process(device, threads)
    loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code, adapter)
    found = run_model(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, chat)
    show.result({**dataclasses.asdict(found), **facts, "model": model}, found.text)
    show.note(f"{found.tokens} tokens, {found.tokens_per_second:.1f} tokens per second")
