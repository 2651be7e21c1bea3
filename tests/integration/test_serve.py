"""`pocketllm serve` as its clients meet it: the `openai` package against a server of a tiny compressed model."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import pocketllm
from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import ConfigError
from pocketllm.integrations import transformers_server
from pocketllm.integrations.request_batches import Batches, OneByOne, start
from pocketllm.integrations.serve_engines import listen
from pocketllm.integrations.transformers_server import Server, Service
from tests import tiny
from tests.commands import Run

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools {% endif %}"
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "{{ m.role }}: {{ m.content }} {% endfor %}"
)
USER = [{"role": "user", "content": "hello"}]


@contextmanager
def answering(service: Service, **settings: Any) -> Iterator[tuple[str, int]]:
    """Host and port of a server in a thread."""
    config, ready = ServeConfig(port=0, **settings), threading.Event()
    bound = listen(config)
    server = Server(service, config, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(60)
        yield bound.getsockname()
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()


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


def client_of(address: tuple[str, int], key: str = "any", cls: Any = None) -> Any:
    url = f"http://{address[0]}:{address[1]}/v1"
    return (cls or openai.OpenAI)(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(address: tuple[str, int]) -> Any:
    return client_of(address)


def alone(loaded: tuple[Any, Any], prompt: str, tokens: int) -> str:
    return pocketllm.generate(*loaded, prompt, tokens).continuation


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does soon."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle(service: Service) -> bool:
    engine: Any = service.engine
    return not engine.running and not engine._cb.batch_processor.scheduler.has_pending_requests()


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


def post(address: tuple[str, int], path: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    status, values = answer.status, json.loads(answer.read())
    connection.close()
    return status, values


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
