"""How good a model is: perplexity, divergence from the dense model, zero-shot tasks, what it writes.

Public is what `__all__` names (docs/api.md says what each is); `perplexity`, `generate` and `measure` stand in
`pocketllm` itself. The modules within may change without notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.evaluate.generate import Generation
    from pocketllm.evaluate.kl import Divergence, standard_error, text_divergence
    from pocketllm.evaluate.local_tasks import local_task_names
    from pocketllm.evaluate.measure import Adapter, Model, TaskOptions
    from pocketllm.evaluate.perplexity import Perplexity, read_text, token_windows
    from pocketllm.evaluate.tasks import PAPER_TASKS, Subject, TaskResult, evaluate_tasks, task_names
    from pocketllm.evaluate.texts import evaluation_text, evaluation_texts
    from pocketllm.evaluate.verify import verify_compressed

__all__ = [
    "PAPER_TASKS",
    "Adapter",
    "Divergence",
    "Generation",
    "Model",
    "Perplexity",
    "Subject",
    "TaskOptions",
    "TaskResult",
    "evaluate_tasks",
    "evaluation_text",
    "evaluation_texts",
    "local_task_names",
    "read_text",
    "standard_error",
    "task_names",
    "text_divergence",
    "token_windows",
    "verify_compressed",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".generate": ["Generation"],
            ".kl": ["Divergence", "standard_error", "text_divergence"],
            ".local_tasks": ["local_task_names"],
            ".measure": ["Adapter", "Model", "TaskOptions"],
            ".perplexity": ["Perplexity", "read_text", "token_windows"],
            ".tasks": ["PAPER_TASKS", "Subject", "TaskResult", "evaluate_tasks", "task_names"],
            ".texts": ["evaluation_text", "evaluation_texts"],
            ".verify": ["verify_compressed"],
        },
    )
