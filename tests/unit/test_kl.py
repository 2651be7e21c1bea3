"""KL divergence and top-1 agreement against a naive float64 computation; bad pairs of models."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocketllm.errors import ConfigError, SourceError, WeightError
from pocketllm.evaluate.kl import standard_error, text_divergence
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.text.windows import token_windows
from tests import tiny

TEXT = "numbers from two models over one text, compared position by position. " * 8


def noisy(model: Any, scale: float = 0.05) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    return noisy(tiny.model()), tiny.model(), tiny.tokenizer()


def test_against_float64(pair: tuple[Any, Any, Any]) -> None:
    model, reference, tokenizer = pair
    found = text_divergence(model, reference, tokenizer, TEXT, context=150, windows=3)
    divergences, agreements = [], []
    with torch.inference_mode():
        for window in token_windows(tokenizer, TEXT, 150, 3):
            q = model(window[None]).logits[0, :-1].double().softmax(-1)
            p = reference(window[None]).logits[0, :-1].double().softmax(-1)
            divergences.append(float((p * (p.log() - q.log())).sum(-1).mean()))
            agreements.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.kl == pytest.approx(statistics.mean(divergences), rel=1e-4)
    assert found.kl_stderr == pytest.approx(statistics.stdev(divergences) / 3**0.5, rel=1e-3)
    assert found.top1_agreement == pytest.approx(statistics.mean(agreements))
    assert 0 < found.top1_agreement < 1 and found.kl > 1e-3
    assert (found.context, found.windows, found.tokens) == (150, 3, 3 * 149)


def test_perplexities_are_those_of_the_perplexity_command(pair: tuple[Any, Any, Any]) -> None:
    model, reference, tokenizer = pair
    shares: list[float] = []
    found = text_divergence(model, reference, tokenizer, TEXT, 40, 4, shares.append)
    assert found.perplexity == pytest.approx(perplexity(model, tokenizer, TEXT, 40, 4).perplexity)
    assert found.reference_perplexity == pytest.approx(
        perplexity(reference, tokenizer, TEXT, 40, 4).perplexity
    )
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_model_does_not_diverge_from_itself(pair: tuple[Any, Any, Any]) -> None:
    _, reference, tokenizer = pair
    found = text_divergence(reference, reference, tokenizer, TEXT, 40, 1)
    assert found.kl == 0 and found.top1_agreement == 1
    assert found.kl_stderr is None and found.top1_agreement_stderr is None


def test_tokens_that_both_models_rule_out(pair: tuple[Any, Any, Any]) -> None:
    model, reference, tokenizer = pair

    def masked(inner: Any) -> Any:
        def forward(ids: Any, use_cache: bool) -> Any:
            logits = inner(ids, use_cache=use_cache).logits.clone()
            logits[..., -1] = -torch.inf  # the last token does not occur in the text
            return SimpleNamespace(logits=logits)

        forward.config, forward.device = inner.config, inner.device  # type: ignore[attr-defined]
        forward.get_input_embeddings = inner.get_input_embeddings  # type: ignore[attr-defined]
        return forward

    found = text_divergence(masked(model), masked(reference), tokenizer, TEXT, 40, 2)
    assert 0 < found.kl < 10


@pytest.mark.parametrize("position", [0, 1])
def test_a_model_of_which_a_weight_is_nan(position: int, pair: tuple[Any, Any, Any]) -> None:
    _, reference, tokenizer = pair
    models = [reference, reference]
    models[position] = tiny.model()
    models[position].config.name_or_path = "damaged"
    with torch.no_grad():
        models[position].model.norm.weight[3] = math.nan
    with pytest.raises(WeightError, match="damaged: its logits are not finite"):
        text_divergence(*models, tokenizer, TEXT, 40, 1)


def test_other_sizes_of_logits_and_positions(pair: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = pair
    larger = tiny.model(vocab_size=100)
    larger.config.name_or_path = "larger"
    with pytest.raises(ConfigError, match="larger has a vocabulary of 100 tokens, the model one of 96"):
        text_divergence(model, larger, tokenizer, TEXT, 40, 1)
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        text_divergence(model, tiny.model("gpt2"), tokenizer, TEXT, 65, 1)
    with pytest.raises(ConfigError, match="the text has"):
        text_divergence(model, model, tokenizer, "short", 40)


@pytest.mark.parametrize("position", [0, 1])
def test_tokens_that_a_model_does_not_have(position: int, pair: tuple[Any, Any, Any]) -> None:
    models = [tiny.model(), tiny.model()]
    models[position] = tiny.model(vocab_size=64)
    models[position].config.name_or_path = "smaller"
    with pytest.raises(SourceError, match=r"smaller: the tokenizer produces token .* embedding has 64 rows"):
        text_divergence(*models, pair[2], TEXT, 40, 1)


def test_standard_error() -> None:
    values = [0.5, 1.5, 4.0]
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert standard_error([1.0]) is None and standard_error([]) is None
