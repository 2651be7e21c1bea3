"""What a server refuses before anything runs: fields of requests, settings, engines; and how stop strings cut."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import ConfigError, ExtraError
from pocketllm.integrations import serve_engines
from pocketllm.integrations.request_sampling import Draw
from pocketllm.integrations.serve_answers import AnswerQueue
from pocketllm.integrations.serve_requests import RequestError, Wanted, check_chat, check_completion

HELLO = [{"role": "user", "content": "hello"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> dict[str, Any]:
    return check_chat({"model": "small", "messages": HELLO, **fields}, "small", Wanted(temperature=0.5))


def test_defaults_are_the_models_and_null_is_absent() -> None:
    wanted = chat(n=1, temperature=None, user="me", response_format={"type": "text"})["wanted"]
    assert wanted == Wanted(temperature=0.5)
    given = {"temperature": 0, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["a"], "max_tokens": 7}
    assert chat(**given)["wanted"] == Wanted(7, 0.0, 0.9, 5, 3, ("a",))
    assert chat(max_tokens=7, max_completion_tokens=8)["wanted"].max_new_tokens == 8
    assert chat(stop="x")["wanted"].stop == ("x",)
    assert check_completion({"prompt": ["a"]}, "small", Wanted())["prompt"] == "a"


def test_messages_of_every_kind() -> None:
    parts = [{"type": "text", "text": "hello"}]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "3", "tool_call_id": "x"}
    found = chat(
        messages=[{"role": "user", "content": parts}, called, answered], tools=[{"type": "function"}]
    )
    assert len(found["messages"]) == 3 and found["tools"]
    assert chat(chat_template_kwargs={"enable_thinking": False})["chat_template_kwargs"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, r"messages\[0\]"),
        ({"messages": [*HELLO, {"role": "user"}]}, r"messages\[1\].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls"),
        ({"tools": ["x"]}, "tools"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {}}}, "chat_template_kwargs"),
        ({"max_tokens": 0}, "max_tokens: got 0, wanted a whole number, at least 1"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature: got -1, wanted a number, 0 to 2"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "high"}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n: got 2, which is not supported; leave it out or send 1"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"generation_config": "{}"}, "generation_config: is not a field that is supported"),
        ({"model": "other"}, "'other' is not served here; 'small' is"),
    ],
)
def test_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        chat(**fields)
    assert caught.value.status == (404 if fields.get("model") else 400)
    assert caught.value.body()["error"]["param"]


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt: contains half of a surrogate pair"):
        check_completion({"prompt": "a \ud800"}, "small", Wanted())
    with pytest.raises(RequestError, match="messages: contains half of a surrogate pair"):
        chat(messages=[{"role": "user", "content": "\udfff"}])


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], None])
def test_refused_prompts(prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt: wanted a single string"):
        check_completion({"prompt": prompt}, "small", Wanted())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"engine": "fast"}, "engine"),
        ({"port": 70000}, "port"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_batch_tokens": 8}, "max_batch_tokens"),
        ({"kv_cache_gb": 0}, "kv_cache_gb"),
        ({"api_key": " "}, "api_key"),
        ({"host": "0.0.0.0"}, "host: 0.0.0.0 can be reached from other machines; set an API key"),
        ({"host": "example.org"}, "set an API key"),
    ],
)
def test_refused_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServeConfig(**settings)


def test_addresses_of_this_machine_need_no_key_others_do() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        ServeConfig(host=host)
    assert "secret" not in repr(ServeConfig(host="0.0.0.0", api_key="secret"))


def test_an_address_in_use_is_refused() -> None:
    with (
        serve_engines.listen(ServeConfig(port=0)) as bound,
        pytest.raises(ConfigError, match="cannot listen on"),
    ):
        serve_engines.listen(ServeConfig(port=bound.getsockname()[1]))


def test_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM only where it can read compressed models: then it takes over this process."""
    assert serve_engines.choose_engine("auto") == "transformers"
    with pytest.raises(ConfigError, match="vLLM cannot read compressed models here"):
        serve_engines.choose_engine("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"fastapi, .*uvicorn, not installed: .*\[serve\]"):
        serve_engines.choose_engine("transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: [(group, name)])
    assert serve_engines.choose_engine("auto") == serve_engines.choose_engine("vllm") == "vllm"
    assert serve_engines.choose_engine("auto", has_adapter=True) == "transformers"
    with pytest.raises(ConfigError, match="--adapter is for transformers"):
        serve_engines.choose_engine("vllm", has_adapter=True)
    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    serve_engines.run_vllm(tmp_path, "small", ServeConfig(api_key="secret"), "packed", "auto")
    program, command, environment = calls[0]
    assert program == command[0] == sys.executable and "secret" not in command
    assert environment["VLLM_API_KEY"] == "secret" and command[command.index("--model") + 1] == str(tmp_path)
    assert '"mode": "packed"' in command[command.index("--hf-overrides") + 1]
    serve_engines.run_vllm(tmp_path, "small", ServeConfig(), "auto", "bfloat16")
    assert "--hf-overrides" not in calls[1][1] and "bfloat16" in calls[1][1]


def pieces(wanted: Wanted, *items: Any) -> tuple[list[Any], int]:
    """What comes out of a queue, and how often it asked to stop."""
    stops: list[int] = []

    async def collect() -> list[Any]:
        queue = AnswerQueue(wanted, lambda: stops.append(1))
        for item in items:
            queue.put_nowait(item)
        return [queue.get_nowait() for _ in range(queue.qsize())]

    return asyncio.run(collect()), len(stops)


def test_stop_strings_cut_wherever_they_are_torn() -> None:
    wanted = Wanted(5, stop=("END", "\n\n"))
    found, stops = pieces(wanted, "one E", "N", "D two", "three", None)
    assert "".join(found[:-1]) == "one " and found[-1] is None and stops == 1
    assert wanted.max_new_tokens is None
    found, stops = pieces(Wanted(5, stop=("END",)), "one EN", "TER", None)
    assert "".join(found[:-1]) == "one ENTER" and stops == 0
    found, stops = pieces(Wanted(5, stop=("END",)), "one EN", None)
    assert "".join(found[:-1]) == "one EN" and stops == 0
    assert pieces(Wanted(5), "a", "b", None, "c")[0] == ["a", "b", None]


def test_draws_follow_the_distribution() -> None:
    """Shares of 2000 draws against softmax(logits / T) among the tokens that top_k and top_p leave."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])

    def shares(wanted: Wanted) -> torch.Tensor:
        draw = Draw(wanted, torch.device("cpu"))
        found = torch.tensor([int(draw.scores(logits).argmax()) for _ in range(2000)])
        return torch.bincount(found, minlength=5) / 2000

    every = (logits / 2).softmax(0)
    assert torch.allclose(shares(Wanted(temperature=2.0, seed=0)), every, atol=0.04)
    two = torch.tensor([*logits[:2].softmax(0), 0, 0, 0])
    assert torch.allclose(shares(Wanted(temperature=1.0, top_k=2, seed=0)), two, atol=0.04)
    assert torch.allclose(shares(Wanted(temperature=1.0, top_p=0.7, seed=0)), two, atol=0.04)
    assert shares(Wanted(temperature=1.0, top_p=0.0, seed=0))[0] == 1
    assert shares(Wanted(temperature=1e-300, seed=0))[0] == 1
    assert torch.equal(shares(Wanted(temperature=1.0, seed=5)), shares(Wanted(temperature=1.0, seed=5)))
