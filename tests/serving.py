"""A server of a model in a thread, and its clients."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

import pocketllm
from pocketllm.config.serve_config import ServeConfig
from pocketllm.integrations.serve_engines import listen
from pocketllm.integrations.transformers_server import Server, Service

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


def client_of(address: tuple[str, int], key: str = "any", cls: Any = None) -> Any:
    url = f"http://{address[0]}:{address[1]}/v1"
    return (cls or openai.OpenAI)(base_url=url, api_key=key, max_retries=0, timeout=60)


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


def post(address: tuple[str, int], path: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    status, values = answer.status, json.loads(answer.read())
    connection.close()
    return status, values
