"""Settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pocketllm.config.checks import at_least
from pocketllm.config.settings import parse_settings, refuse_options, settings_of


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation.

    context: Tokens per window of perplexity and divergence.
    windows: Number of windows, from the start of the text; none takes all.
    limit: Number of documents of each task, from its start; none takes all.
    batch_tokens: Tokens in a batch of task prompts, padding included.
    max_length: Longest task prompt with its answer, in tokens.
    """

    context: int = 1024
    windows: int | None = None
    limit: int | None = None
    batch_tokens: int = 1024
    max_length: int = 2048

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field."""
        for name, least in (
            ("context", 2),
            ("windows", 1),
            ("limit", 1),
            ("batch_tokens", 1),
            ("max_length", 2),
        ):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, least)


EVAL_OPTIONS = {"context": "--context", "windows": "--windows", "limit": "--limit"}
"""Settings that have their own command-line option; `--set` refuses them."""


def eval_config(
    context: int, windows: int | None, limit: int | None, settings: tuple[str, ...]
) -> EvalConfig:
    """The settings of an evaluation. settings: KEY=VALUE words of `--set`.

    Raises:
        ConfigError: an unknown key, one with an option of its own, or a value out of range.
    """
    given = parse_settings(settings, settings_of(EvalConfig()), "pocketllm settings eval")
    refuse_options(given, EVAL_OPTIONS)
    return EvalConfig(context=context, windows=windows, limit=limit, **given)
