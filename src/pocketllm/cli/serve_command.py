"""`pocketllm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pocketllm.cli.option_groups import LoadOptions, RunOptions, with_groups
from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Runnable
from pocketllm.config.serve_config import ServeConfig
from pocketllm.files import real_path

if TYPE_CHECKING:
    from pocketllm.integrations.transformers_server import Server

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm serve smol-2bit\n\n"
    "  pocketllm serve smol-2bit --port 8001 --max-requests 8 --kv-cache-gb 0.5\n\n"
    "  POCKETLLM_API_KEY=secret pocketllm serve smol-2bit --host 0.0.0.0"
)
@with_groups
def serve(model: Runnable, *, config: ServeConfig, how: LoadOptions, run: RunOptions) -> None:
    """Serve a compressed or dense model with an OpenAI-compatible API until Ctrl-C."""
    from pocketllm.integrations.serve_engines import VLLM, choose_engine, listen, run_vllm
    from pocketllm.source import resolve

    show = run.output()
    name = real_path(Path(model)).name if Path(model).exists() else model
    if choose_engine(config.engine, how.adapter is not None) == VLLM:
        run_vllm(resolve(model), name, config, how.mode, how.dtype)
    run.setup()
    from pocketllm.integrations.request_batches import start
    from pocketllm.integrations.transformers_server import Server, Service

    with listen(config) as bound:
        loaded, tokenizer, facts = how.load(model, run)
        running, reason = start(loaded, tokenizer, config)
        if reason:
            show.note(f"{name} is served one request at a time: batches cannot run it ({reason})")
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{bound.getsockname()[1]}/v1"
        server: Server
        server = Server(
            Service(name, loaded, tokenizer, running),
            config,
            on_ready=lambda: _show_ready(show, server, config, {**facts, "model": name, "url": url}),
        )
        server.serve_until_interrupted(bound)


def _show_ready(show: Output, server: Server, config: ServeConfig, facts: dict[str, Any]) -> None:
    engine = server.service.engine
    limits = f"at most {config.max_requests} requests at a time, {engine.room} tokens each"
    cached = getattr(engine, "cache_tokens", None)
    if cached is not None:
        limits += f"; key-value cache for {cached} tokens, at most {config.kv_cache_gb:g} GB"
    key = "with an API key" if config.api_key else "without an API key"
    values = {**facts, "cache_tokens": cached, "context": engine.room, "api_key": config.api_key is not None}
    show.result(values, f"Serving {facts['model']} at {facts['url']} {key}\n{limits}; Ctrl-C to stop")
    show.stdout.file.flush()
