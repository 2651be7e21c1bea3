"""Perplexity equals its definition; generation continues a prompt; bad input is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pocketllm.errors import ConfigError, WeightError
from pocketllm.evaluate import generate as generation
from pocketllm.evaluate.perplexity import perplexity
from tests import tiny

TEXT = "Some text, long enough to fill a few windows of tokens; and then some more of it. " * 3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.mark.parametrize("windows", [None, 1, 3])
def test_definition(windows: int | None, model: Any, tokenizer: Any) -> None:
    found = perplexity(model, tokenizer, TEXT, 20, windows)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    count = windows or len(ids) // 20
    total = 0.0
    for window in range(count):
        part = torch.tensor(ids[window * 20 : (window + 1) * 20])
        with torch.inference_mode():
            p = model(part[None]).logits[0].double().softmax(-1)
        total -= sum(math.log(float(p[i, part[i + 1]])) for i in range(19))
    assert found.perplexity == pytest.approx(math.exp(total / (19 * count)), rel=1e-6)
    assert (found.context, found.windows, found.tokens) == (20, count, 19 * count)


def test_progress_ends_at_one(model: Any, tokenizer: Any) -> None:
    shares: list[float] = []
    perplexity(model, tokenizer, TEXT, 20, 4, shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_context_beyond_the_model(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        perplexity(tiny.model("gpt2"), tokenizer, TEXT, 65)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad: float, tokenizer: Any) -> None:
    damaged = tiny.model()
    damaged.config.name_or_path = "folder/damaged"
    damaged.lm_head.bias = torch.nn.Parameter(torch.zeros(96))
    with torch.no_grad():
        damaged.lm_head.bias[3] = -math.inf  # a token that is ruled out is no damage
        assert math.isfinite(perplexity(damaged, tokenizer, TEXT.replace(" ", ""), 20).perplexity)
        damaged.lm_head.bias[4] = bad
    with pytest.raises(WeightError, match=r"folder/damaged: its logits are not finite .* torch.float32"):
        perplexity(damaged, tokenizer, TEXT, 20)


def test_generation(model: Any, tokenizer: Any) -> None:
    first = generation.generate(model, tokenizer, "hello", 6)
    assert first.text.startswith("hello") and 1 <= first.tokens <= 6 and first.tokens_per_second > 0
    assert generation.generate(model, tokenizer, "hello", 6).text == first.text
    sampled = [generation.generate(model, tokenizer, "hello", 6, 1.0, seed).text for seed in (0, 0, 1, 2)]
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
    tokenizer.chat_template = "user: {{ messages[0]['content'] }} reply:"
    assert generation.generate(model, tokenizer, "hello", 2, chat=True).text.startswith("user: hello reply:")


@pytest.mark.parametrize(("prompt", "tokens", "temperature"), [(" ", 1, 0.0), ("x", 0, 0.0), ("x", 1, -1.0)])
def test_bad_generation(prompt: str, tokens: int, temperature: float, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError):
        generation.generate(model, tokenizer, prompt, tokens, temperature)
