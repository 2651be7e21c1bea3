"""What vLLM's users do with a served model: adapters, pipeline stages, models on the Hub."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, served
from tests.vllm import engine
from tests.vllm.conftest import Pair

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed: tests/vllm/make_environment.sh",
    ),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]


ADAPT = """
import sys
from pathlib import Path
import torch
import pocketllm
from tests.recovery import SENTENCE, quick_loop

small, root = map(Path, sys.argv[1:])
(root / "text").write_text(SENTENCE * 40)
training = {"steps": 8, "learning_rate": 0.05, "context": 24, "validation_items": 4, "loop": quick_loop()}
config = pocketllm.LoraTuneConfig(rank=8, alpha=16, texts=(str(root / "text"),), **training)
pocketllm.lora(small, root / "adapter", config)
pocketllm.merge(small, root / "adapter", root / "merged", dtype=torch.float32)
"""


@pytest.fixture(scope="module")
def adapted(pair: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An adapter trained on the compressed model, and the dense model with it merged.

    In a process of its own: vLLM, once it has run a model of transformers, leaves layers of its own in transformers.
    """
    small, root = pair("tied")[0], tmp_path_factory.mktemp("adapted")
    subprocess.run([sys.executable, "-c", ADAPT, small, root], check=True, cwd=Path(__file__).parents[2])
    return root / "adapter", root / "merged"


@pytest.mark.parametrize("mode", [None, "packed"])
def test_adapters(mode: str | None, pair: Callable[[str], Pair], adapted: Pair) -> None:
    """An adapter on the compressed model gives the tokens of the merged dense model."""
    small, _ = pair("tied")
    adapter, merged = adapted
    tokens, logprobs = engine.answers(merged)
    found, close = engine.answers(small, mode, adapter, enable_lora=True, max_lora_rank=8)
    assert found == tokens and close == pytest.approx(logprobs, rel=1e-3)
    assert found != engine.answers(small, mode, enable_lora=True, max_lora_rank=8)[0]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM wants a core for each rank")
def test_two_stages(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline parallel. On CPUs, vLLM makes the tensors between stages only when it compiles."""
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    small, dense = pair("untied")
    found, wanted = (
        engine.answers(folder, pipeline_parallel_size=2, **compiled) for folder in (small, dense)
    )
    assert found == wanted


def test_a_hub_id(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    """vLLM's own server, given the name of a model on the Hub."""
    small, dense = pair("tied")
    with served() as hub:
        hub.add("owner/small", small)
        changes = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        environment = {**os.environ, **changes, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        port = engine.free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "owner/small"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "64", "--max-num-seqs", "8"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        ) as server:
            try:
                engine.wait_for_health(port, server)
                asked = {"prompt": engine.PROMPTS[0], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
                asked |= {"model": "owner/small", "return_token_ids": True}
                found = engine.post(port, "/v1/completions", asked)
            finally:
                os.killpg(server.pid, signal.SIGTERM)
    assert any("model.safetensors" in request for request in hub.requests)
    assert found["choices"][0]["token_ids"] == engine.answers(dense)[0][0]
