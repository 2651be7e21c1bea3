"""What every way of running requests shares: stop strings, the limit on lengths, the record of what runs."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from transformers.cli.serving.utils import _StreamError

from pocketllm.config.serve_config import ServeConfig
from pocketllm.integrations.serve_requests import RequestError, Wanted
from pocketllm.text.vocabulary import positions_of


class AnswerQueue(asyncio.Queue[Any]):
    """Pieces of an answer, cut at the first stop string. on_stop: called once it has been found."""

    def __init__(self, wanted: Wanted, on_stop: Callable[[], None]) -> None:
        super().__init__()
        self.wanted, self.on_stop = wanted, on_stop
        self._held, self._ended = "", False

    def put_nowait(self, item: Any) -> None:
        """Add a piece of text, anything else that a streamer sends, or None for the end."""
        if self._ended:
            return
        if type(item) is str and self.wanted.stop:  # subclasses are no part of the text
            self._put_text(self._held + item)
            return
        if item is None or isinstance(item, _StreamError):
            self._ended = True
            self._send(self._held)
        super().put_nowait(item)

    def _put_text(self, text: str) -> None:
        ends = [at for at in map(text.find, self.wanted.stop) if at >= 0]
        if ends:
            self._ended = True
            self._send(text[: min(ends)])
            super().put_nowait(None)
            self.wanted.max_new_tokens = None  # the answer was not cut for its length
            self.on_stop()
            return
        kept = max(_common(text, stop) for stop in self.wanted.stop)
        self._held = text[len(text) - kept :]
        self._send(text[: len(text) - kept])

    def _send(self, text: str) -> None:
        if text:
            super().put_nowait(text)


def _common(text: str, stop: str) -> int:
    """Number of characters at the end of a text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Answering(ABC):
    """Base of both ways: streams, collects, limits and cancels; `_start` is what they do differently."""

    def __init__(self, model: Any, config: ServeConfig) -> None:
        self.model, self.config = model, config
        self.room: int | None = positions_of(model.config)
        self.running: dict[str, Any] = {}

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Wanted,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[AnswerQueue, Any]:
        """Start a request; as in the base class, with a `Wanted` in place of transformers' configuration.

        Raises:
            RequestError: the prompt is empty or, with what is to be generated, too long.
        """
        self._set_length(_length(inputs), gen_config)
        queue = AnswerQueue(gen_config, lambda: streamer.cancel())
        streamer = self._start(processor, inputs, queue, request_id, response_parser)
        self.running[request_id] = streamer
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Wanted, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Text, number of prompt tokens, ids of the new tokens.

        Raises:
            RequestError: as `generate_streaming`, or generation failed.
        """
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RequestError(f"generation failed: {item.msg}", status=503)
            text += item
        return text, _length(inputs), self._before_stop(processor, list(streamer.ids), gen_config)

    def end(self, request_id: str) -> None:
        """Forget a request; if it still runs, nobody waits for it any more, and it is cancelled."""
        streamer = self.running.pop(request_id, None)
        if streamer is not None:
            streamer.cancel()

    @staticmethod
    def _before_stop(processor: Any, ids: list[int], wanted: Wanted) -> list[int]:
        """The tokens before the first stop string."""
        text = processor.decode(ids) if wanted.stop else ""
        ends = [at for at in map(text.find, wanted.stop) if at >= 0]
        while ends and len(processor.decode(ids)) > min(ends):
            ids.pop()
        return ids

    def _set_length(self, prompt: int, wanted: Wanted) -> None:
        if not prompt:
            raise RequestError("prompt: has no tokens; give some text to continue", "prompt")
        left = None if self.room is None else self.room - prompt
        if left is not None and left < (wanted.max_new_tokens or 1):
            asked = f" and max_tokens is {wanted.max_new_tokens}" if wanted.max_new_tokens else ""
            raise RequestError(
                f"max_tokens: the prompt has {prompt} tokens{asked}, but prompt and answer may have {self.room} "
                "together; shorten them",
                "max_tokens",
                code="context_length_exceeded",
            )
        if wanted.max_new_tokens is None:
            longest = self.config.max_new_tokens
            wanted.max_new_tokens = longest if left is None else min(longest, left)

    @abstractmethod
    def _start(
        self, processor: Any, inputs: Any, queue: AnswerQueue, request_id: str, response_parser: Any
    ) -> Any:
        """Start to generate; the streamer that fills the queue."""


def _length(inputs: Any) -> int:
    """Tokens of a prompt: a list, or a tensor [1, tokens]."""
    ids = inputs["input_ids"]
    return len(ids) if isinstance(ids, list) else int(ids.shape[-1])


def stream_error(message: str) -> Any:
    """An error in a stream; the handlers put its message between quotation marks of JSON."""
    return _StreamError(json.dumps(message)[1:-1])
