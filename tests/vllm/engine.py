"""vLLM in the process of the tests: importing it takes longer than everything they do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PROMPTS = ("once upon a time", "hello", "the quick brown fox")


def weights(folder: Path, **settings: Any) -> dict[str, Any]:
    """Parameters of vLLM's model after its loader has filled them."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    args = EngineArgs(str(folder), **{**_settings(), **settings})
    config = args.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        _join_alone()
        loader = get_model_loader(config.load_config)
        model = loader.create_model(config, config.model_config)
        loader.load_weights(model, config.model_config)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _join_alone() -> None:
    """A group of one process, made anew for each model: only some have groups of experts."""
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    address = get_distributed_init_method("127.0.0.1", get_open_port())
    init_distributed_environment(1, 0, address, 0, backend="gloo")  # the first time, later nothing
    destroy_model_parallel()
    initialize_model_parallel(1, 1)


def _settings() -> dict[str, Any]:
    return {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}


def answers(
    folder: Path, mode: str | None = None, adapter: Path | None = None, **settings: Any
) -> tuple[list[list[int]], list[float]]:
    """(tokens of each prompt chosen greedily, their summed log probabilities)."""
    from vllm.lora.request import LoRARequest

    from vllm import LLM, SamplingParams

    named = {} if mode is None else {"quantization_config": {"quant_method": "pocketllm", "mode": mode}}
    llm = LLM(str(folder), hf_overrides=named, **{**_settings(), **settings})
    asked = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
    lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    answered = llm.generate(list(PROMPTS), asked, use_tqdm=False, lora_request=lora)
    found = [done.outputs[0] for done in answered]
    return [list(one.token_ids) for one in found], [one.cumulative_logprob for one in found]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def wait_for_health(port: int, server: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Return when a server answers; fail when it ends, or after some minutes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise AssertionError("the server does not answer")


def post(port: int, path: str, body: dict[str, Any]) -> Any:
    """The answer to a request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
