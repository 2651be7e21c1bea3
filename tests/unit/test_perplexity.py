"""Perplexity equals its definition; bad input is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pocketllm.errors import ConfigError, WeightError
from pocketllm.evaluate.perplexity import perplexity
from tests import tiny

TEXT = "Some text, long enough to fill a few windows of tokens; and then some more of it. " * 3


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
