"""`pocketllm serve` as its clients meet it: the `openai` package against a server of a tiny compressed model."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import pocketllm
from pocketllm.config.serve_config import ServeConfig
from pocketllm.integrations import transformers_server
from pocketllm.integrations.request_batches import Batches, start
from pocketllm.integrations.transformers_server import Service
from tests.serving import TEMPLATE, USER, alone, answering, client_of, idle, post, until


@pytest.fixture(scope="module")
def loaded(small: Path) -> tuple[Any, Any]:
    model, tokenizer = pocketllm.load(small, dtype=torch.float32)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture(scope="module")
def service(loaded: tuple[Any, Any]) -> Service:
    engine, reason = start(*loaded, ServeConfig())
    assert isinstance(engine, Batches) and not reason
    return Service("small", *loaded, engine)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[tuple[str, int]]:
    with answering(service) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: tuple[str, int]) -> Any:
    return client_of(address)


def test_completion_and_chat(client: Any, loaded: tuple[Any, Any]) -> None:
    done = client.completions.create(model="small", prompt="once upon", max_tokens=9)
    assert done.choices[0].text == alone(loaded, "once upon", 9)
    assert done.choices[0].finish_reason == "length" and done.model == "small"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (9, 9)
    done = client.chat.completions.create(model="small", messages=USER, max_tokens=9)
    assert done.choices[0].message.content == alone(loaded, "user: hello ", 9)
    assert done.choices[0].message.role == "assistant"


def test_streaming(client: Any) -> None:
    asked = {"model": "small", "max_tokens": 9, "temperature": 1, "seed": 4}
    chunks = list(client.chat.completions.create(messages=USER, stream=True, **asked))
    whole = client.chat.completions.create(messages=USER, **asked)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 9
    text = client.completions.create(prompt="hello", **asked).choices[0].text
    chunks = list(client.completions.create(prompt="hello", stream=True, **asked))
    assert "".join(c.choices[0].text for c in chunks) == text and len(chunks) > 5


def test_stop_strings(client: Any, service: Service) -> None:
    asked = {"model": "small", "prompt": "hello", "max_tokens": 60, "temperature": 1, "seed": 1}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:23]
    for stream in (False, True):
        done = client.completions.create(stop=[stop], stream=stream, **asked)
        chunks = list(done) if stream else [done]
        assert "".join(c.choices[0].text for c in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    until(lambda: idle(service))


def test_tools_and_reasoning(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokenizer's response template says is taken out of the text; and a stop string before that."""
    fields = {
        "reasoning_content": {"open": "(", "close": ")", "content": "text"},
        "content": {"close": "</s>", "content": "text"},
    }
    template = {"defaults": {"role": "assistant"}, "start_anchor": "hello ", "fields": fields}
    monkeypatch.setattr(service.tokenizer, "response_template", template, raising=False)
    asked = {"model": "small", "messages": USER, "max_tokens": 200, "temperature": 2, "seed": 1}
    asked["tools"] = [{"type": "function", "function": {"name": "f"}}]
    done = client.chat.completions.create(**asked)
    message = done.choices[0].message
    assert done.usage.prompt_tokens == len("1 tools user: hello ")
    assert message.reasoning_content and "(" not in message.content
    chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked)]
    assert "".join(delta.content or "" for delta in chunks) == message.content
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in chunks]
    assert "".join(thought) == message.reasoning_content
    stop = message.content[4:6]
    cut = client.chat.completions.create(stop=stop, **asked).choices[0].message.content
    assert cut == message.content[: message.content.index(stop)]


def test_models(client: Any) -> None:
    assert [each.id for each in client.models.list()] == ["small"]
    assert client.models.retrieve("small").max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt2"}, openai.NotFoundError, "'gpt2' is not served here; 'small' is"),
        ({"messages": []}, openai.BadRequestError, "at least one message"),
        ({"messages": [{"role": "user", "content": "no"}]}, openai.BadRequestError, "refuses them .not that"),
        ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens is 1000000000, but .* 2048"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, openai.BadRequestError, "3007 tokens, but"),
        ({"stream": True, "max_tokens": 10**9}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_wrong_input(client: Any, fields: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        client.chat.completions.create(**{"model": "small", "messages": USER, **fields})


@pytest.mark.parametrize(
    ("path", "body", "kind", "status"),
    [
        ("/v1/completions", b"{", "application/json", 400),
        ("/v1/completions", b"[1]", "application/json", 400),
        ("/v1/completions", b"[" * 100_000, "application/json", 400),
        ("/v1/completions", b"\xff", "application/json", 400),
        ("/v1/completions", b'{"prompt": "x"}', "text/plain", 415),
        ("/v1/completions", b" " * 4_000_001, "application/json", 413),
        ("/v1/completions", b'{"prompt": ""}', "application/json", 400),
        ("/v1/models", b"{}", "application/json", 405),
        ("/load_model", b'{"model": "gpt2"}', "application/json", 404),
        ("/reset", b"{}", "application/json", 404),
    ],
)
def test_wrong_bodies(address: tuple[str, int], path: str, body: bytes, kind: str, status: int) -> None:
    found, values = post(address, path, body, kind)
    assert found == status and values["error"]["message"]


def test_without_chat_template(service: Service, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="small", messages=USER)


def test_a_bug_is_an_error_500(service: Service, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_server, "check_completion", lambda *arguments: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="internal error: ZeroDivisionError"):
        client.completions.create(model="small", prompt="hello")


def test_a_stream_that_is_broken_off(client: Any, service: Service) -> None:
    """What nobody reads any more is not generated."""
    stream = client.completions.create(model="small", prompt="hello", max_tokens=2000, stream=True)
    next(stream)
    (running,) = service.engine.running.values()
    stream.close()
    until(lambda: idle(service))
    assert running.total_tokens < 2000
    assert client.completions.create(model="small", prompt="hello", max_tokens=3).choices[0].text


def test_an_answer_that_nobody_waits_for(address: tuple[str, int], service: Service) -> None:
    connection = http.client.HTTPConnection(*address, timeout=30)
    body = json.dumps({"prompt": "hello", "max_tokens": 2000})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: bool(service.engine.running))
    (running,) = service.engine.running.values()
    connection.close()
    until(lambda: idle(service))
    assert running.total_tokens < 2000


def test_32_at_once(address: tuple[str, int], service: Service, loaded: tuple[Any, Any]) -> None:
    """Each gets its own answer, whatever the others sample; and they are computed together."""
    sampler: Any = service.engine.sampler  # type: ignore[union-attr]
    rows: list[int] = []
    note = sampler.prepare_tensor_args

    def noting(requests: Any) -> Any:
        rows.append(len(requests))
        return note(requests)

    sampler.prepare_tensor_args = noting
    drawn = {"prompt": "hello", "temperature": 1, "seed": 4}

    async def ask() -> list[str]:
        client = client_of(address, cls=openai.AsyncOpenAI)
        asked: list[dict[str, Any]] = [
            drawn if n % 4 == 3 else {"prompt": f"number {n} is"} for n in range(32)
        ]
        jobs = [client.completions.create(model="small", max_tokens=24, **each) for each in asked]
        done = await asyncio.gather(*jobs)
        await client.close()
        return [each.choices[0].text for each in done]

    texts = asyncio.run(ask())
    assert [texts[n] for n in (0, 13, 30)] == [alone(loaded, f"number {n} is", 24) for n in (0, 13, 30)]
    assert len({text for n, text in enumerate(texts) if n % 4 == 3}) == 1
    assert 8 < max(rows) <= 32
    del sampler.prepare_tensor_args
