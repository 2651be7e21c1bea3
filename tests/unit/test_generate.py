"""Generation continues a prompt, alone and in a batch, as text comes; bad input is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pocketllm.errors import ConfigError
from pocketllm.evaluate import generate as generation
from pocketllm.evaluate.generate import Sampling, generate_batch
from tests import tiny

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}reply:"


def test_generation(model: Any, tokenizer: Any) -> None:
    first = generation.generate(model, tokenizer, "hello", 6)
    assert first.text.startswith("hello") and 1 <= first.tokens <= 6 and first.tokens_per_second > 0
    assert generation.generate(model, tokenizer, "hello", 6).text == first.text
    sampled = [
        generation.generate(model, tokenizer, "hello", 6, Sampling(1.0, seed=seed)).text
        for seed in (0, 0, 1, 2)
    ]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


@pytest.mark.parametrize(("pad", "wanted"), [(0, 0), (2, 2), (None, 1)])
def test_generation_pads_with_the_pad_token(
    pad: int | None, wanted: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its number is 0; the end of text stands in only where there is none."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    found: list[int] = []

    def padded(ids: torch.Tensor, pad_token_id: int, **settings: Any) -> torch.Tensor:
        found.append(pad_token_id)
        return ids

    monkeypatch.setattr(model, "generate", padded)
    generation.generate(model, tokenizer, "hello")
    assert found == [wanted]


def test_generation_with_a_chat_template(model: Any) -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(ConfigError, match="no chat template"):
        generation.generate(model, tokenizer, "hello", chat=True)
    tokenizer.chat_template = TEMPLATE
    done = generation.generate(model, tokenizer, "hello", 2, chat=True)
    assert done.text.startswith("user: hello reply:") and done.text.endswith(done.continuation)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert generation.generate(model, tokenizer, messages, 2).text.startswith(
        "system: be brief user: hello reply:"
    )
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"refuses these messages .*roles must alternate"):
        generation.generate(model, tokenizer, "hello", chat=True)


def test_text_comes_in_pieces(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    done = generation.generate(model, tokenizer, "hello", 12, on_text=pieces.append)
    assert "".join(pieces) == done.continuation and len(pieces) > 1


def test_a_batch_continues_as_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    prompts = ["hello", "a much longer prompt than the first", "some"]
    batch = generate_batch(model, tokenizer, prompts, 8)
    alone = [generation.generate(model, tokenizer, prompt, 8) for prompt in prompts]
    assert [each.text for each in batch] == [each.text for each in alone]
    assert [each.tokens for each in batch] == [each.tokens for each in alone]


def test_a_text_that_ends_early_is_not_padded(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = model.generation_config.eos_token_id

    def ends(ids: torch.Tensor, pad_token_id: int, **settings: Any) -> torch.Tensor:
        return torch.cat([ids, torch.tensor([[5, end, end, end], [5, 6, 7, 8]])], dim=1)

    monkeypatch.setattr(model, "generate", ends)
    assert [each.tokens for each in generate_batch(model, tokenizer, ["one", "two"], 4)] == [2, 4]


def test_sampling_limits(model: Any, tokenizer: Any) -> None:
    """A single candidate leaves no choice, whichever limit says so."""
    greedy = generation.generate(model, tokenizer, "hello", 6).text
    for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        sampling = Sampling(temperature=5.0, seed=3, **limit)  # type: ignore[arg-type]
        assert generation.generate(model, tokenizer, "hello", 6, sampling).text == greedy, limit
    ids = tokenizer("hello")["input_ids"]
    done = generation.generate(model, tokenizer, "hello", 8, Sampling(repetition_penalty=1e9))
    new = tokenizer(done.continuation)["input_ids"]
    assert not set(new) & set(ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, wanted 0 or more"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p: got 0.0, wanted above 0, at most 1"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_sampling(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(("prompt", "tokens"), [(" ", 1), ("x", 0), ([], 1)])
def test_bad_generation(prompt: Any, tokens: int, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError):
        generation.generate(model, tokenizer, prompt, tokens)
    with pytest.raises(ConfigError, match="give at least one"):
        generate_batch(model, tokenizer, [])
