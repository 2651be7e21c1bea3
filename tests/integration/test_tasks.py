"""lm-eval tasks on tiny models: scores equal to lm-eval's own adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from pocketllm.evaluate import harness, tasks
from tests import tiny
from tests.task_data import CONFIG, certain_model, subject, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Any:
    return certain_model()


def requests() -> list[Any]:
    """Answers of one token that share a prompt, answers of several, a prompt that is too long."""
    return [
        *((("", ""), list(range(5, 25)), [token]) for token in (30, 31, 32)),
        *((("", ""), list(range(40, 40 + n)), list(range(n, 2 * n))) for n in (1, 2, 7, 19)),
        (("", ""), list(range(3, 93)), [5, 6, 7]),
    ]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_scores_are_those_of_lm_evals_adapter(architecture: str, batch_tokens: int) -> None:
    made, tokenizer = tiny.model(architecture), tiny.tokenizer()
    shares: list[float] = []
    lm = harness.PocketLM(made, tokenizer, batch_tokens, 48, shares.append)
    with harness.quiet():
        stock = HFLM(pretrained=made, tokenizer=tokenizer, batch_size=3, max_length=48)
        expected = stock._loglikelihood_tokens(requests(), disable_tqdm=True)
    for keeps in (True, False):  # with and without the model's help
        lm._keeps = lm._keeps and keeps
        found = lm._loglikelihood_tokens(requests())
        for (own, greedy), (wanted, same) in zip(found, expected, strict=True):
            assert own == pytest.approx(wanted, abs=1e-4) and greedy == same
    assert lm.truncated == 2 * 1
    assert shares[-1] == 1.0 and shares == sorted(shares[: len(shares) // 2]) * 2


def test_one_text_split_at_two_places(model: Any) -> None:
    text = list(range(5, 30))
    lm = harness.PocketLM(model, tiny.tokenizer(), 64, 48)
    found = lm._loglikelihood_tokens([(("", ""), text[:n], text[n:]) for n in (24, 10, 20)])
    with torch.inference_mode():
        scores = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    scores = scores.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    for n, (score, _) in zip((24, 10, 20), found, strict=True):
        assert score == pytest.approx(float(scores[n - 1 :].sum()), abs=1e-4)


def by_lm_eval(name: str, model: Any, data: Path) -> tuple[Any, Any]:
    """(the task, what lm-eval's own evaluation gives with its own adapter)."""
    [source] = tasks._sources(name, data, hub=False)
    with harness.quiet():
        stock = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=4, max_length=2048)
        task = source.load()
        task.set_config(key="num_fewshot", value=0)
        loaded: Any = {"tasks": {name: task}}
        return task, evaluate(stock, loaded, bootstrap_iters=0, log_samples=True)


@pytest.mark.parametrize("name", ["piqa", "boolq", "winogrande", "arc_easy", "lambada_openai"])
def test_the_probability_of_the_right_answer(name: str, model: Any, data: Path) -> None:
    """Held against the likelihoods and the right answer that lm-eval's own metric is given."""
    [result] = tasks.evaluate_tasks([name], subject(model), CONFIG, data, hub=False).values()
    if name == "lambada_openai":
        assert "choice_probability" not in result.scores
        return
    task, found = by_lm_eval(name, model, data)
    task._metric_fn_list = {"likelihood": None}
    for sample, own in zip(found["samples"][name], result.scores["choice_probability"], strict=True):
        right, given = task.process_results(sample["doc"], sample["filtered_resps"])["likelihood"]
        expected = np.exp(given - np.max(given)) / np.exp(given - np.max(given)).sum()
        assert own == pytest.approx(expected[right], abs=1e-4)


@pytest.mark.parametrize("name", ["piqa", "boolq", "lambada_openai"])
def test_results_are_those_of_lm_eval(name: str, model: Any, data: Path) -> None:
    [result] = tasks.evaluate_tasks([name], subject(model), CONFIG, data, hub=False).values()
    _, found = by_lm_eval(name, model, data)
    scores = [sample["acc"] for sample in found["samples"][name]]
    expected = found["results"][name]
    assert result.acc == pytest.approx(expected["acc,none"])
    assert result.acc_stderr == pytest.approx(lm_eval.api.metrics.mean_stderr(scores))
    assert result.scores["acc"] == scores
    assert result.acc_norm == expected.get("acc_norm,none")
    assert (result.n, result.limit, result.chance) == (12, None, None if "lambada" in name else 0.5)
    if name == "lambada_openai":
        assert result.other["perplexity"]["value"] == pytest.approx(expected["perplexity,none"], rel=1e-4)
        assert result.other["perplexity"]["stderr"]
