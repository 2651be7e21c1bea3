"""Which engine serves a model, whether what it needs is installed, and the address it listens on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import ConfigError, ExtraError
from pocketllm.format.layout import STORE

TRANSFORMERS, VLLM = "transformers", "vllm"
_PLUGINS = "vllm.general_plugins"
_EXTRA = ("fastapi", "jinja2", "openai", "psutil", "uvicorn")


def choose_engine(wanted: str, has_adapter: bool = False) -> str:
    """The engine for `--engine`: auto is vLLM where it can read compressed models, else transformers.

    Args:
        has_adapter: an adapter is served with the model, which is left to transformers.

    Raises:
        ConfigError: vLLM is requested but cannot read them. ExtraError: packages of the extra `serve` are missing.
    """
    if wanted == VLLM and has_adapter:
        raise ConfigError("engine: --adapter is for transformers; vLLM has --enable-lora, see docs/vllm.md")
    if wanted != TRANSFORMERS and not has_adapter and _vllm_reads_compressed():
        return VLLM
    if wanted == VLLM:
        raise ConfigError(
            "engine: vLLM cannot read compressed models here: either vllm is not installed, or no plug-in named "
            f"pocketllm is registered in {_PLUGINS}; use transformers"
        )
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtraError(
            f"serving needs {', '.join(missing)}, not installed: pip install 'pocketllm-codec[serve]'"
        )
    return TRANSFORMERS


def _vllm_reads_compressed() -> bool:
    plugins = importlib.metadata.entry_points(group=_PLUGINS, name="pocketllm")
    return bool(plugins) and importlib.util.find_spec("vllm") is not None


def run_vllm(folder: Path, name: str, config: ServeConfig, mode: str, dtype: str) -> NoReturn:
    """Replace this process by vLLM's server. The API key goes through the environment, where `ps` does not show it.

    Args:
        mode: `packed`, or else decoded at load. dtype: to compute in; `auto` is the checkpoint's.
    """
    import torch

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--host", config.host, "--port", str(config.port)]
    command += ["--max-num-seqs", str(config.max_requests), "--dtype", dtype]
    command += ["--kv-cache-memory-bytes", str(int(config.kv_cache_gb * 10**9))]
    command += ["--max-model-len", "-1"]  # the longest context that fits into the cache, at most the model's own
    if not torch.cuda.is_available():
        command.append("--enforce-eager")  # on a CPU, torch.compile takes minutes and needs a C++ compiler
    if mode == "packed":
        command += [
            "--hf-overrides",
            json.dumps({"quantization_config": {"quant_method": STORE, "mode": mode}}),
        ]
    environment = dict(os.environ)
    if config.api_key is not None:
        environment["VLLM_API_KEY"] = config.api_key
    os.execve(sys.executable, command, environment)


def listen(config: ServeConfig) -> socket.socket:
    """A socket bound to the address; it does not accept connections yet.

    Raises:
        ConfigError: the address is in use or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"host, port: cannot listen on {config.host}:{config.port} ({error.strerror or error}); "
            "choose another port, or 0 for a free one"
        ) from error
    return bound
