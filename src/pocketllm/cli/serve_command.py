"""`pocketllm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Threads,
    Trust,
)
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
def serve(
    model: Runnable,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need an API key.")
    ] = ServeConfig.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = ServeConfig.port,
    api_key: Annotated[
        str | None, typer.Option(envvar="POCKETLLM_API_KEY", help="Key that clients must send.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm, or auto (vllm where it can read compressed models).")
    ] = ServeConfig.engine,
    max_requests: Annotated[
        int, typer.Option(help="Requests computed together; more wait.")
    ] = ServeConfig.max_requests,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused (429).")
    ] = ServeConfig.max_waiting,
    kv_cache_gb: Annotated[
        float, typer.Option(help="Size of the key-value cache that all requests share.")
    ] = ServeConfig.kv_cache_gb,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step, prompts included.")
    ] = ServeConfig.max_batch_tokens,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate where a request sets no limit.")
    ] = ServeConfig.max_new_tokens,
    adapter: Adapter = None,
    mode: Mode = "auto",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a compressed or dense model with an OpenAI-compatible API until Ctrl-C."""
    from pocketllm.integrations.serve_engines import VLLM, choose_engine, listen, run_vllm
    from pocketllm.source import resolve

    show = Output(json, quiet)
    config = ServeConfig(
        host=host,
        port=port,
        api_key=api_key,
        engine=engine,
        max_requests=max_requests,
        max_waiting=max_waiting,
        kv_cache_gb=kv_cache_gb,
        max_batch_tokens=max_batch_tokens,
        max_new_tokens=max_new_tokens,
    )
    name = real_path(Path(model)).name if Path(model).exists() else model
    if choose_engine(config.engine, adapter is not None) == VLLM:
        run_vllm(resolve(model), name, config, mode, dtype)
    setup_process(device, threads)
    from pocketllm.integrations.request_batches import start
    from pocketllm.integrations.transformers_server import Server, Service

    with listen(config) as bound:
        loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code, adapter)
        running, reason = start(loaded, tokenizer, config)
        if reason:
            show.note(f"{name} is served one request at a time: batches cannot run it ({reason})")
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"
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
        limits += f"; key-value cache {config.kv_cache_gb:g} GB for {cached} tokens"
    key = "with an API key" if config.api_key else "without an API key"
    values = {**facts, "cache_tokens": cached, "context": engine.room, "api_key": config.api_key is not None}
    show.result(values, f"Serving {facts['model']} at {facts['url']} {key}\n{limits}; Ctrl-C to stop")
    show.stdout.file.flush()
