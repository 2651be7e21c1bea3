"""Get the accuracy back: distillation into the compressed form, and LoRA beside it.

Public is what `__all__` names (docs/api.md says what each is); `distill`, `lora` and `merge` stand in `pocketllm`
itself. The modules within may change without notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.recover.adapter import attach_adapter, check_adapter, read_record
    from pocketllm.recover.chain import check_recovery, compress_and_distill
    from pocketllm.recover.distill import Distilled, dry_run_distill
    from pocketllm.recover.lora import Adapted, dry_run_lora
    from pocketllm.recover.merge import Merged

__all__ = [
    "Adapted",
    "Distilled",
    "Merged",
    "attach_adapter",
    "check_adapter",
    "check_recovery",
    "compress_and_distill",
    "dry_run_distill",
    "dry_run_lora",
    "read_record",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".adapter": ["attach_adapter", "check_adapter", "read_record"],
            ".chain": ["check_recovery", "compress_and_distill"],
            ".distill": ["Distilled", "dry_run_distill"],
            ".lora": ["Adapted", "dry_run_lora"],
            ".merge": ["Merged"],
        },
    )
