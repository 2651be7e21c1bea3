"""`pocketllm serve`: what its engines do at their limits, and the command."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import pocketllm
from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import ConfigError
from pocketllm.integrations import transformers_server
from pocketllm.integrations.request_batches import OneByOne, start
from pocketllm.integrations.transformers_server import Server, Service
from tests import tiny
from tests.commands import Run
from tests.serving import TEMPLATE, alone, answering, client_of, idle, post, until


@pytest.fixture(scope="module")
def loaded(small: Path) -> tuple[Any, Any]:
    model, tokenizer = pocketllm.load(small, dtype=torch.float32)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_key_and_limit(loaded: tuple[Any, Any]) -> None:
    engine, _ = start(*loaded, ServeConfig())
    service = Service("small", *loaded, engine)
    with answering(service, api_key="secret", max_requests=1, max_waiting=0) as address:
        client = client_of(address, "secret")
        assert [each.id for each in client.models.list()] == ["small"]
        for wrong in ("secre", "Secret"):
            with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
                client_of(address, wrong).models.list()
        assert post(address, "/v1/completions", b'{"prompt": "hello"}')[0] == 401
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        connection.close()
        stream = client.completions.create(model="small", prompt="hello", max_tokens=2000, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="1 requests are running or waiting"):
            client.completions.create(model="small", prompt="hello")
        stream.close()
        until(lambda: idle(service))


def test_a_cache_that_holds_few_requests(loaded: tuple[Any, Any]) -> None:
    """The limit of one request is what the cache holds; several that do not fit together take turns."""
    block = 64 * 2 * 2 * 18 * 4  # bytes: 64 tokens, keys and values, 2 layers, 1 head of 18 float32
    engine, _ = start(*loaded, ServeConfig(kv_cache_gb=3 * block / 1e9))
    service = Service("small", *loaded, engine)
    with answering(service) as address:
        assert engine.room == 3 * 64

        async def ask() -> list[str]:
            client = client_of(address, cls=openai.AsyncOpenAI)
            asked = [f"number {n} is" for n in range(4)]
            jobs = [client.completions.create(model="small", prompt=p, max_tokens=60) for p in asked]
            done = await asyncio.gather(*jobs)
            await client.close()
            return [each.choices[0].text for each in done]

        assert asyncio.run(ask()) == [alone(loaded, f"number {n} is", 60) for n in range(4)]
        whole = client_of(address).completions.create(model="small", prompt="x" * 92, max_tokens=100)
        assert whole.usage.total_tokens <= 192


def test_a_cache_that_does_not_fit(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import cache

    monkeypatch.setattr(cache.PagedAttentionMemoryHandler, "get_available_memory", lambda self: 1000)
    with pytest.raises(ConfigError, match="kv_cache_gb: 1 GB do not fit into memory; choose a smaller value"):
        start(*loaded, ServeConfig())


def test_what_batches_get_wrong_is_found_at_the_start(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that loses values, and one that fails."""
    from transformers.generation.continuous_batching import cache

    kept = cache.PagedAttentionCache.update

    def lossy(*arguments: Any, **options: Any) -> Any:
        keys, values = kept(*arguments, **options)
        return keys, values.roll(1, dims=1) * 30

    monkeypatch.setattr(cache.PagedAttentionCache, "update", lossy)
    engine, reason = start(*loaded, ServeConfig())
    assert isinstance(engine, OneByOne) and "not the most likely ones without batching" in reason
    monkeypatch.setattr(cache.PagedAttentionCache, "update", lambda *arguments, **options: 1 / 0)
    engine, reason = start(*loaded, ServeConfig())
    assert isinstance(engine, OneByOne) and "division by zero" in reason


def test_an_engine_that_has_ended(loaded: tuple[Any, Any]) -> None:
    """/health and requests report it."""
    engine, _ = start(*loaded, ServeConfig())
    broken: Any = engine
    service = Service("small", *loaded, engine)
    broken._cb.batch_processor.update_batch = lambda: 1 / 0
    with answering(service) as address:
        client = client_of(address)
        for _ in range(2):
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(model="small", prompt="hello")
            assert caught.value.status_code == 503
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.status == 503 and json.loads(answer.read())["reason"] == "division by zero"
        connection.close()


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has no keys and values to batch."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=96, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=1)
    folder = tmp_path_factory.mktemp("recurrent") / "mamba"
    MambaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_one_at_a_time_where_batches_cannot_run(recurrent: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(recurrent, dtype=torch.float32).eval()
    engine, reason = start(model, tiny.tokenizer(), ServeConfig())
    assert isinstance(engine, OneByOne) and reason
    with answering(Service("mamba", model, tiny.tokenizer(), engine)) as address:
        client = client_of(address)
        asked = {"model": "mamba", "prompt": "hello", "max_tokens": 30}
        done = client.completions.create(**asked)
        assert done.choices[0].text == alone((model, tiny.tokenizer()), "hello", 30)
        drawn = {**asked, "temperature": 1, "seed": 2}
        text = client.completions.create(**drawn).choices[0].text
        chunks = list(client.completions.create(stream=True, **drawn))
        assert "".join(c.choices[0].text for c in chunks) == text and len(chunks) > 5
        assert (
            client.completions.create(stop=text[7:9], **drawn).choices[0].text == text[: text.find(text[7:9])]
        )
        stream = client.completions.create(stream=True, **{**asked, "max_tokens": 10**6})
        next(stream)
        stream.close()
        assert client.completions.create(**asked).choices[0].text == done.choices[0].text


def test_an_answer_that_runs_when_the_server_stops(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an error, soon."""
    monkeypatch.setattr(transformers_server, "_GRACE_SECONDS", 0.05)
    engine, _ = start(*loaded, ServeConfig())
    with answering(Service("small", *loaded, engine)) as address:
        stream = client_of(address).completions.create(
            model="small", prompt="hello", max_tokens=2000, stream=True
        )
        next(stream)
    with pytest.raises(openai.APIError):
        list(stream)


def test_the_command_until_it_is_interrupted(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, servers = Server.startup, []

    async def startup(self: Server, sockets: Any = None) -> None:
        await begun(self, sockets)
        servers.append(self)
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)

    monkeypatch.setattr(Server, "startup", startup)
    monkeypatch.setenv("POCKETLLM_API_KEY", "secret")
    code, out, err = run("serve", small, "--port", "0", "--threads", "1")
    assert code == 0, err
    assert "Serving small at http://127.0.0.1:" in out and "with an API key" in out and "secret" not in out
    assert servers[0].service.engine._cb._generation_thread is None  # type: ignore[union-attr]
    found = run.json("serve", small, "--port", "0", "--threads", "1", "--mode", "dense")
    assert found["model"] == "small" and found["context"] == 2048 and found["api_key"] is True


def test_the_command_says_why_batches_cannot_run(
    run: Run, recurrent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "serve_until_interrupted", lambda self, bound: self.on_ready())
    code, _, err = run("serve", recurrent, "--port", "0", "--threads", "1")
    assert code == 0 and "mamba is served one request at a time: batches cannot run it (" in err


def test_wrong_use_of_the_command(run: Run, small: Path, tmp_path: Path) -> None:
    code, _, err = run("serve", small, "--host", "0.0.0.0")
    assert code == 2 and "set an API key" in err
    code, _, err = run("serve", small, "--engine", "vllm")
    assert code == 2 and "vLLM cannot read compressed models here" in err
    code, _, err = run("serve", tmp_path / "missing", "--port", "0")
    assert code == 1 and "missing" in err
