"""What a client of the OpenAI API may ask for: the bodies of requests, checked, with defaults filled in.

An unsupported field that would change the answer is refused instead of ignored. Fields that only label a request are
accepted and have no effect.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.errors import PocketError

# Fields that are not supported -> the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
}
_NEUTRAL_IN_CHAT = {
    **_NEUTRAL,
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
}
_NEUTRAL_IN_COMPLETION = {**_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
_LABELS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "stream_options",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
    }
)
_SAMPLING = frozenset({"model", "stream", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens"})
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_STOPS = 16


class RequestError(PocketError):
    """A request that is refused. field: what is wrong in it. status: of HTTP. code: the API's name for it."""

    def __init__(
        self, message: str, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code

    def body(self) -> dict[str, Any]:
        """As the API writes errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


@dataclass
class Wanted:
    """How a request is to be answered.

    max_new_tokens: None until the length of the prompt is known, and again after a stop string. temperature: 0 is
    greedy. top_k: 0 takes all tokens. seed: None draws one.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def defaults_of(model: Any) -> Wanted:
    """What a model's generation_config.json asks for where a request does not say; greedy if nothing."""
    stored = model.generation_config
    if not stored.do_sample:
        return Wanted()
    given = {"temperature": stored.temperature, "top_p": stored.top_p, "top_k": stored.top_k}
    return Wanted(**{"temperature": 1.0, **{key: value for key, value in given.items() if value is not None}})


def check_chat(body: Mapping[str, Any], served: str, defaults: Wanted) -> dict[str, Any]:
    """The body of /v1/chat/completions, reduced to what transformers' handler reads; `wanted` holds the rest.

    Raises:
        RequestError: another model than `served`, an unknown or unsupported field, a value out of range.
    """
    own = {"messages", "max_completion_tokens", "tools", "chat_template_kwargs"}
    wanted = _wanted(body, served, defaults, _NEUTRAL_IN_CHAT, own)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: wanted a list of at least one message", "messages")
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RequestError("tools: wanted a list of objects", "tools")
    return {
        "messages": messages,
        "tools": tools or None,
        "chat_template_kwargs": _template_settings(body.get("chat_template_kwargs")),
        "stream": _flag(body, "stream"),
        "wanted": wanted,
    }


def check_completion(body: Mapping[str, Any], served: str, defaults: Wanted) -> dict[str, Any]:
    """The body of /v1/completions, in the same form.

    Raises:
        RequestError: as `check_chat`.
    """
    wanted = _wanted(body, served, defaults, _NEUTRAL_IN_COMPLETION, {"prompt"})
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt: wanted a single string; send one request per prompt", "prompt")
    return {"prompt": prompt, "stream": _flag(body, "stream"), "wanted": wanted}


def _wanted(
    body: Mapping[str, Any],
    served: str,
    defaults: Wanted,
    neutral: Mapping[str, tuple[Any, ...]],
    own: set[str],
) -> Wanted:
    """How to answer; refuses other models, and fields that are unknown or not supported."""
    if body.get("model") not in (None, served):
        message = f"model: {body['model']!r} is not served here; {served!r} is"
        raise RequestError(message, "model", status=404, code="model_not_found")
    for key, value in body.items():
        _need_text(key, value)
        if key in neutral:
            if value is not None and value not in neutral[key]:
                allowed = json.dumps(neutral[key][0])
                raise RequestError(
                    f"{key}: got {value!r}, which is not supported; leave it out or send {allowed}", key
                )
        elif key not in _LABELS | _SAMPLING | own:
            raise RequestError(f"{key}: is not a field that is supported here; leave it out", key)
    longest = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    given = {
        "max_new_tokens": _number(body, longest, int, 1),
        "temperature": _number(body, "temperature", float, 0, 2),
        "top_p": _number(body, "top_p", float, 0, 1),
        "top_k": _number(body, "top_k", int, 0),
        "seed": _number(body, "seed", int, -(2**63), 2**63 - 1),
        "stop": _stop(body.get("stop")),
    }
    return dataclasses.replace(defaults, **{key: value for key, value in given.items() if value is not None})


def _number(
    body: Mapping[str, Any], key: str, kind: Callable[[Any], Any], least: float, most: float = float("inf")
) -> Any:
    value = body.get(key)
    if value is None:
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or (kind is int and not isinstance(value, int)):
        limit = f"at least {least}" if most == float("inf") else f"{least} to {most}"
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{key}: got {value!r}, wanted {what}, {limit}", key)
    return kind(value)


def _need_text(key: str, value: Any) -> None:
    """JSON may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{ascii(key)[1:-1]}: contains half of a surrogate pair", key) from None


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value not in (None, True, False):
        raise RequestError(f"{key}: got {value!r}, wanted true or false", key)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    fits = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not fits or len(texts) > _MOST_STOPS:
        raise RequestError(f"stop: wanted a string or up to {_MOST_STOPS} of them, none empty", "stop")
    return tuple(texts)


def _check_message(message: Any, where: str) -> None:
    """Refuse messages that transformers cannot convert, and content that is not text."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise RequestError(f"{where}: wanted an object whose role is one of {', '.join(_ROLES)}", where)
    if message.get("tool_calls") is not None:
        _check_tool_calls(message["tool_calls"], f"{where}.tool_calls")
        return
    message.pop("tool_calls", None)
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    text_only = all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    )
    if not (isinstance(content, str) or parts) or not text_only:
        raise RequestError(f"{where}.content: wanted a string, or a list of parts of type text", where)


def _check_tool_calls(calls: Any, where: str) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):  # type: ignore[union-attr]
            raise RequestError(
                f"{where}: wanted a list of calls, each with a function's name and JSON arguments", where
            )


def _template_settings(value: Any) -> dict[str, Any]:
    """Variables of a chat template, such as enable_thinking; not the parameters of `apply_chat_template` itself."""
    from transformers import PreTrainedTokenizerBase

    settings = value or {}
    own = {
        "load_audio_from_video",
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    }
    if not isinstance(settings, dict) or any(
        key in own or not isinstance(setting, str | bool | int | float) for key, setting in settings.items()
    ):
        raise RequestError(
            "chat_template_kwargs: wanted an object of variables of the chat template, each a string, "
            "a number, true or false",
            "chat_template_kwargs",
        )
    return settings
