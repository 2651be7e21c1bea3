"""Run lm-eval on a model in memory: a language model adapter that suits CPUs, and one task at a time.

lm-eval's own adapter computes [batch, tokens, vocabulary] logits of entire prompts. Only the positions of answers
are scored, so here logits are computed for those alone (`logits_to_keep`), in batches of about equal cost: a number
of tokens, not of rows. Scores agree with lm-eval's adapter; softmax is always in float32.

Imported lazily: it needs the extra `eval`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from pocketllm.errors import ConfigError, SourceError, reason_of
from pocketllm.evaluate.kl import standard_error
from pocketllm.evaluate.perplexity import check_likelihood
from pocketllm.text.vocabulary import check_tokens, positions_of

_LOGITS_BYTES = 1 << 29  # at most, for the logits of a batch; limits it if the vocabulary is large
Progress = Callable[[float], None]
_Request = tuple[Any, list[int], list[int]]  # (texts, context tokens, continuation tokens)


class PocketLM(HFLM):  # type: ignore[misc]
    """A causal language model for lm-eval, compressed or dense.

    Args:
        model, tokenizer: as returned by `pocketllm.load`.
        batch_tokens: tokens per batch, including padding.
        max_length: longest prompt with its answer; longer ones lose their beginning.
        progress: called with the finished share of a task's tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int,
        max_length: int,
        progress: Progress = lambda share: None,
    ) -> None:
        positions = positions_of(model.config) or max_length
        with quiet(), _tied_already(model):
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=min(max_length, positions)
            )
        self.batch_tokens = batch_tokens
        self.progress = progress
        self.truncated = 0
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of (context, continuation) texts, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log likelihood, whether greedy decoding gives it) of each continuation, in the order of requests.

        Requests with the same input (answers of one token) share one row.

        Raises:
            WeightError: as `check_likelihood`. SourceError: as `check_tokens`.
        """
        check_tokens(
            self.model,
            torch.tensor([token for _, context, answer in requests for token in (*context, *answer)]),
        )
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = context + continuation
            self.truncated += len(tokens) > self.max_length + 1
            groups.setdefault(tuple(tokens[-(self.max_length + 1) : -1]), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done, total = 0, sum(map(len, groups))
        for batch in self._batches(sorted(groups, key=lambda row: (-len(row), row))):
            members = [groups[row] for row in batch]
            lengths = [max(len(requests[n][2]) for n in numbers) for numbers in members]
            for numbers, logits in zip(members, self._rows(batch, lengths), strict=True):
                log_probabilities = logits.float().log_softmax(-1)
                for number in numbers:
                    score, is_greedy = _score(log_probabilities, requests[number][2])
                    answers[number] = check_likelihood(score, self.model), is_greedy
            done += sum(map(len, batch))
            self.progress(done / total)
        return answers

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Continue prompts, [batch, tokens] ids; raises SourceError as `check_tokens`."""
        check_tokens(self.model, context)
        found: Tensor = super()._model_generate(context, *arguments, **options)
        return found

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows, given longest first, in batches of at most `batch_tokens` tokens (at least one row)."""
        budget = min(self.batch_tokens, _LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        start = 0
        while start < len(rows):
            count = max(1, budget // len(rows[start]))
            yield list(rows[start : start + count])
            start += count

    @torch.inference_mode()
    def _rows(self, batch: list[tuple[int, ...]], lengths: list[int]) -> Iterator[Tensor]:
        """Logits of the last `length` positions of each row, [length, vocabulary].

        Rows are padded on the right, where a causal model does not look.
        """
        ids = torch.full((len(batch), len(batch[0])), self.tokenizer.pad_token_id)
        wanted = []
        for number, (row, length) in enumerate(zip(batch, lengths, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            wanted.append(torch.arange(len(row) - length, len(row)))
        kept = torch.cat(wanted).unique()
        given = {"logits_to_keep": kept.to(self.device)} if self._keeps else {}
        logits = self.model(input_ids=ids.to(self.device), use_cache=False, **given).logits
        for number, positions in enumerate(wanted):
            chosen = torch.searchsorted(kept, positions) if self._keeps else positions
            yield logits[number, chosen.to(self.device)]


def _score(log_probabilities: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log likelihood, whether greedy decoding gives it) of a continuation that ends at the last position.

    Args:
        log_probabilities: [positions, vocabulary], at least as many positions as the continuation has tokens.
    """
    rows = log_probabilities[-len(continuation) :]
    wanted = torch.tensor(continuation, device=rows.device)
    picked = rows.gather(1, wanted[:, None])
    return float(picked.sum()), bool((rows.argmax(-1) == wanted).all())


@contextlib.contextmanager
def _tied_already(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights again: loading has done it, and packed weights do not allow it."""
    model.__dict__["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of lm-eval and datasets."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bar, bars = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda rows, *args, **kwargs: rows
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_tasks(spec: str, registry: bool = False) -> list[Any]:
    """Load lm-eval's tasks for a spec; several if it names a group.

    Args:
        spec: path of a task YAML; with `registry`, lm-eval's name of a task, group or tag.

    Raises:
        ConfigError: lm-eval does not know the name.
        SourceError: the data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager(include_defaults=registry)
        if registry and spec not in manager.all_tasks:
            raise ConfigError(unknown_task(spec, manager.all_subtasks))
        try:
            return list(manager.load([spec])["tasks"].values())
        except (OSError, ValueError, RuntimeError) as error:
            raise SourceError(f"{spec}: its data cannot be loaded ({reason_of(error)})") from error


def unknown_task(name: str, known: Sequence[str]) -> str:
    """The error message for an unknown name."""
    import difflib

    from pocketllm.evaluate.local_tasks import local_tasks

    near = difflib.get_close_matches(name, [*local_tasks(), *known], 5)
    hint = f"similar: {', '.join(near)}; " if near else ""
    return f"unknown task {name!r}; {hint}from local files: {', '.join(local_tasks())}"


def run_task(lm: PocketLM, task: Any, limit: int | None) -> dict[str, Any]:
    """Score one of lm-eval's tasks, without examples in the prompt unless the task sets some.

    Returns:
        n; metrics {name: (value, standard error or None)}; scores {acc, acc_norm: 0 or 1 per document;
        choice_probability: as the function of that name}; chance: accuracy of guessing; version; truncated. If
        answers are not chosen from a list, chance is None and there are no choice probabilities.
    """
    from lm_eval.evaluator import evaluate

    name = task.config.task
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    lm.truncated = 0
    with quiet():
        found = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    documents = {sample["doc_id"]: sample for sample in samples}
    metrics, scores = {}, {}
    for key, value in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kind == "none" else key
        values = [sample.get(metric) for sample in samples if sample.get("filter", "none") == kind]
        metrics[label] = (float(value), _stderr(metric, float(value), values))
        if label in ("acc", "acc_norm"):
            scores[label] = [float(value) for value in values]
    chance = None
    if task.OUTPUT_TYPE == "multiple_choice":
        scores["choice_probability"] = [choice_probability(task, sample) for sample in documents.values()]
        chance = sum(1 / len(task.doc_to_choice(s["doc"])) for s in documents.values()) / len(documents)
    return {
        "n": len(documents),
        "metrics": metrics,
        "scores": scores,
        "chance": chance,
        "version": found["versions"].get(name),
        "truncated": lm.truncated,
    }


def choice_probability(task: Any, sample: Mapping[str, Any]) -> float:
    """Probability of the right answer among the choices: softmax of their log likelihoods.

    Accuracy changes only if another answer becomes the most likely; this changes with every change of the model.

    Args:
        task: one of lm-eval's multiple-choice tasks.
        sample: one of its documents with the model's answers.
    """
    document = sample["doc"]
    choices = task.doc_to_choice(document)
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    several = right if isinstance(right, list) else [right]
    wanted = [choices.index(each) if isinstance(each, str) else each for each in several]
    given = torch.tensor([answer[0] for answer in sample["filtered_resps"]], dtype=torch.float64)
    return float(given.softmax(0)[wanted].sum())


def _stderr(metric: str, value: float, values: list[Any]) -> float | None:
    """Standard error of a metric from its value per document; None if it is not their mean."""
    if not all(isinstance(v, int | float) for v in values):
        return None
    spread = standard_error([float(v) for v in values])
    if spread is None:
        return None
    if metric == "perplexity":  # exp(−mean): the delta method
        return value * spread
    return spread if math.isclose(sum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12) else None
