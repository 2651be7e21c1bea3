"""Continue prompts with a model, and measure the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError, reason_of
from pocketllm.files import is_utf8
from pocketllm.text.chat import has_template
from pocketllm.text.vocabulary import check_tokens
from pocketllm.torch_state import in_default_torch_state

Prompt = str | Sequence[dict[str, Any]]
"""A text, or the messages of a chat (`role` and `content` each)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names are those of transformers.

    temperature: 0 takes the likeliest token, and then only repetition_penalty matters. top_k: sample among that many
    of the likeliest tokens; 0 takes all. top_p: among the likeliest that together have this probability.
    min_p: among those at least this times as likely as the likeliest. repetition_penalty: above 1 makes tokens that
    have occurred less likely. seed: of the random choices.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (good, words) in wanted.items():
            if not good:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted {words}")

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        penalty = {"repetition_penalty": self.repetition_penalty}
        if not self.temperature:
            return {"do_sample": False, **penalty}
        limits = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p or None}
        return {"do_sample": True, "temperature": self.temperature, **limits, **penalty}


@dataclass(frozen=True)
class Generation:
    """Generated text.

    text: prompt and continuation. continuation: the new part. tokens: number of new tokens.
    tokens_per_second: new tokens per second of wall time, of all prompts of a batch together.
    """

    text: str
    continuation: str
    tokens: int
    tokens_per_second: float


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`; greedy if no sampling is given.

    Args:
        chat: apply the tokenizer's chat template to a prompt that is a text; messages always go through it.
        on_text: called with each piece of the continuation as soon as it is complete (at word boundaries).

    Raises:
        ConfigError: a prompt that is empty or no Unicode text, fewer than 1 new token, no chat template, or one that
            refuses the messages.
        SourceError: as `check_tokens`.
    """
    return _generate(model, tokenizer, [prompt], max_new_tokens, sampling, chat, on_text)[0]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
    chat: bool = False,
) -> list[Generation]:
    """Continue several prompts at once, padded on the left; otherwise as `generate`.

    Raises:
        ConfigError: no prompt, or as `generate`.
        SourceError: as `check_tokens`.
    """
    if not prompts:
        raise ConfigError("prompts: got none; give at least one")
    return _generate(model, tokenizer, prompts, max_new_tokens, sampling, chat, None)


@in_default_torch_state
def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | None,
    chat: bool,
    on_text: Callable[[str], None] | None,
) -> list[Generation]:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: got {max_new_tokens}, wanted at least 1")
    sampling = sampling or Sampling()
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = _pad_left(encoded, pad or 0)
    check_tokens(model, ids)
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
            **sampling.options(),
        )
    seconds = time.perf_counter() - started
    new = [_until_end(row[ids.shape[1] :].tolist(), _end_tokens(model)) for row in out]
    speed = sum(map(len, new)) / seconds
    return [
        Generation(
            text=tokenizer.decode(before + after, skip_special_tokens=True),
            continuation=tokenizer.decode(after, skip_special_tokens=True),
            tokens=len(after),
            tokens_per_second=speed,
        )
        for before, after in zip(encoded, new, strict=True)
    ]


def _encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a prompt."""
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ConfigError("prompt: is empty; give some text to continue")
    if isinstance(prompt, str) and not is_utf8(prompt):
        raise ConfigError(f"prompt: got {prompt!a}, which is not UTF-8; encode it, or run in a UTF-8 locale")
    if isinstance(prompt, str) and not chat:
        ids = tokenizer(prompt)["input_ids"]
    else:
        if not has_template(tokenizer):
            raise ConfigError("chat: this model's tokenizer has no chat template; omit --chat")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        except Exception as error:  # a template is a program of its own
            raise ConfigError(
                f"chat: the chat template refuses these messages ({reason_of(error)})"
            ) from error
    return list(ids)


def _pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [prompts, longest]."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and including the first token that ends a text; what follows in a batch is padding."""
    return next((ids[: n + 1] for n, token in enumerate(ids) if token in ends), ids)


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
