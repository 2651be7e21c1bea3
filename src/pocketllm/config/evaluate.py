"""Settings of measuring a model."""

from __future__ import annotations

from dataclasses import dataclass

from pocketllm.config.checks import at_least


@dataclass(frozen=True)
class EvalConfig:
    """How a model is measured.

    context: tokens per window of perplexity and divergence. windows: first ones used, None all.
    limit: first documents of each task, None all. batch_tokens: tokens of a batch of task prompts, padding
    counted. max_length: longest prompt of a task with its answer, in tokens.
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
