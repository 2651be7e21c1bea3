"""An OpenAI-compatible server on the parts of transformers': its handlers, prompts, streams and batches.

It differs from `transformers serve` in these points: it serves one model, which the caller has loaded and verified,
and no request can load another; every field of a request is checked; each request of a batch has its own sampling
settings; stop strings work in batches; a request is cancelled when its client disconnects.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

import uvicorn
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality

from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import reason_of
from pocketllm.integrations.request_batches import Batches, OneByOne
from pocketllm.integrations.serve_requests import (
    RequestError,
    Wanted,
    check_chat,
    check_completion,
    defaults_of,
)
from pocketllm.text.chat import has_template

_MOST_BODY_BYTES = 4_000_000
_GRACE_SECONDS = 2  # for running answers when the server stops


class _Checked:
    """Changes to both handlers: requests have been checked already, and the model is loaded."""

    def __init__(self, service: Service) -> None:
        super().__init__(model_manager=service, generation_state=service)  # type: ignore[call-arg]
        self.service = service

    def _validate_request(self, body: dict[str, Any]) -> None:
        pass

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.service.name, self.service.model, self.service.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *others: Any, **options: Any) -> Wanted:
        wanted: Wanted = body["wanted"]
        return wanted


class _Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Checked, CompletionHandler):  # type: ignore[misc]
    pass


class Service:
    """One model behind the API. name: of the model. engine: runs the requests."""

    def __init__(self, name: str, model: Any, tokenizer: Any, engine: Batches | OneByOne) -> None:
        self.name, self.model, self.tokenizer, self.engine = name, model, tokenizer, engine
        self.defaults = defaults_of(model)
        self.created = int(time.time())
        self._chat, self._completion = _Chat(self), _Completion(self)

    # What transformers' handlers ask their model manager and their generation state.

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        """Text only."""
        return Modality.LLM

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """Whether prompts are wanted as lists, as for batches."""
        return isinstance(self.engine, Batches)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Batches | OneByOne:
        """What runs the requests."""
        return self.engine

    # Endpoints.

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = check_chat(await _body(request), self.name, self.defaults)
        if not has_template(self.tokenizer):
            raise RequestError(
                "messages: the model's tokenizer has no chat template; use /v1/completions", "messages"
            )
        return await self._answer(self._chat, body, request)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = check_completion(await _body(request), self.name, self.defaults)
        return await self._answer(self._completion, body, request)

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{name}."""
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "pocketllm"}
        own["max_model_len"] = self.engine.room
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [own]})
        if wanted != self.name:
            raise RequestError(f"model {wanted!r} is not served here; {self.name!r} is", status=404)
        return JSONResponse(own)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        error = self.engine.fatal_error()
        state = {"status": "ok"} if error is None else {"status": "stopped", "reason": reason_of(error)}
        return JSONResponse(state, status_code=200 if error is None else 503)

    async def _answer(self, handler: Any, body: dict[str, Any], request: Request) -> Response:
        """A handler's answer; the request is cancelled if the client disconnects first."""
        task = asyncio.ensure_future(handler.handle_request(body, request.scope["request_id"]))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return Response(status_code=499)  # nobody reads it
            response: Response = task.result()
        except TemplateError as error:
            raise RequestError(
                f"messages: the chat template refuses them ({reason_of(error)})", "messages"
            ) from error
        finally:
            task.cancel()
            gone.cancel()
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)
        return response


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_end(chunks: Any) -> AsyncIterator[Any]:
    """The events of a stream, followed by the one that marks its end."""
    async for chunk in chunks:
        yield chunk
    yield "data: [DONE]\n\n"


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object that a request carries."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A web page cannot send this type to another site without asking, and is refused when it asks.
        raise RequestError("content-type: wanted application/json", status=415)
    received = b""
    async for chunk in request.stream():
        received += chunk
        if len(received) > _MOST_BODY_BYTES:
            raise RequestError(f"the body has more than {_MOST_BODY_BYTES} bytes", status=413)
    try:
        values = json.loads(received)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({reason_of(error)})") from error
    if not isinstance(values, dict):
        raise RequestError("the body is not a JSON object")
    return values


class _Gate:
    """In front of all endpoints: the API key, the limit on requests, and their end.

    However a request ends (answered, refused, disconnected), its generation is stopped.
    """

    def __init__(self, app: Any, engine: Batches | OneByOne, config: ServeConfig) -> None:
        self.app, self.engine, self.running = app, engine, 0
        self.limit = config.max_requests + config.max_waiting
        self.key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif self.key is not None and not hmac.compare_digest(_authorization(scope), self.key):
            refused = RequestError("wrong or missing API key", status=401, code="invalid_api_key")
            await _refusal(refused)(scope, receive, send)
        elif self.running >= self.limit:
            busy = RequestError(f"{self.limit} requests are running or waiting; try later", status=429)
            await _refusal(busy)(scope, receive, send)
        else:
            request_id = f"req-{uuid.uuid4().hex}"
            self.running += 1
            try:
                await self.app({**scope, "request_id": request_id}, receive, send)
            finally:
                self.running -= 1
                self.engine.end(request_id)


def _authorization(scope: Any) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"authorization"), b"")


def _refusal(error: RequestError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    """Errors as the API writes them."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    if not isinstance(error, RequestError):
        error = RequestError(f"internal error: {type(error).__name__}", status=500)
    return _refusal(error)


def build_app(service: Service, config: ServeConfig) -> Starlette:
    """The application: five endpoints, and nothing that loads, unloads or names other models."""
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/health", service.health),
    ]
    gate = Middleware(_Gate, engine=service.engine, config=config)
    handlers: Any = {RequestError: _refused, HTTPException: _refused, Exception: _refused}
    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)


class Server(uvicorn.Server):
    """A server for one `Service`. on_ready: called once it answers."""

    def __init__(
        self, service: Service, config: ServeConfig, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        settings = uvicorn.Config(
            build_app(service, config),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        super().__init__(settings)
        self.service, self.on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give running answers a moment to finish, then stop the engine, which ends the others with an error."""
        for listener in self.servers:
            listener.close()
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.service.engine.running and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.service.engine.stop)
        await super().shutdown(sockets)

    def serve_until_interrupted(self, bound: socket.socket) -> None:
        """Answer until the process receives SIGINT or SIGTERM."""
        gc.freeze()  # what is loaded by now stays: collections need not visit it
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises it again once all is closed
                self.run(sockets=[bound])
        finally:
            self.service.engine.stop()  # its thread would keep the process alive
            gc.unfreeze()
