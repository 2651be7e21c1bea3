"""`lm_eval --model hf --model_args pretrained=DIR` and `pocketllm eval --tasks` give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.commands import Run

WORDS = ("one", "two and two", "a number", "nothing", "much more")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local task files: answers chosen from a list, and a last word to be guessed."""
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    rows = [
        {"goal": f"count to {n}", "sol1": WORDS[n % 5], "sol2": WORDS[(2 * n + 1) % 5], "label": n % 2}
        for n in range(12)
    ]
    texts = [{"text": f"there were {n} of {word}"} for n, word in enumerate(WORDS)]
    for name, lines in (("piqa/valid", rows), ("lambada/test", texts)):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data"


def test_the_same_numbers(data: Path, small: Path, tmp_path: Path, run: Run) -> None:
    """lm-eval makes the model itself, with its own adapter. Its command line is run by test_startup_hook.py."""
    own = run.json("eval", small, "--tasks", "piqa,lambada_openai", "--data", data)["tasks"]
    files = [str(path) for path in (tmp_path / "cache" / "eval" / "data").glob("*.yaml")]
    theirs = simple_evaluate(
        model="hf",
        model_args=f"pretrained={small},dtype=float32",
        tasks=files,
        task_manager=TaskManager(include_defaults=False),  # reading the thousands that lm-eval has takes long
        device="cpu",
        batch_size=4,
        bootstrap_iters=2,  # more than none, so that the standard errors of means are given
    )["results"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        found = theirs["piqa"][f"{metric},none"]
        assert own["piqa"][metric] == pytest.approx(found, rel=1e-9), metric
    assert own["lambada_openai"]["acc"] == theirs["lambada_openai"]["acc,none"]
    perplexity = theirs["lambada_openai"]["perplexity,none"]
    assert own["lambada_openai"]["other"]["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)
