"""PocketLLM: compress the weights of language models 8 to 20 times and run the result.

    import pocketllm
    pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    model, tokenizer = pocketllm.load("out")

Importing the package registers the format with transformers (when transformers is imported later, too), so
`AutoModelForCausalLM.from_pretrained("out")` works as well. Method: arXiv 2511.17637.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketllm.config import (
    PRESETS,
    CodecConfig,
    CompressConfig,
    DistillConfig,
    LoopConfig,
    LoraTuneConfig,
    preset,
)
from pocketllm.errors import PocketError
from pocketllm.integrations.hook import register_when_imported

if TYPE_CHECKING:
    from pocketllm.integrations.transformers import load
    from pocketllm.model.compress import compress, dry_run
    from pocketllm.model.report import Report
    from pocketllm.recover.distill import distill
    from pocketllm.recover.lora import lora
    from pocketllm.recover.merge import merge

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CodecConfig",
    "CompressConfig",
    "DistillConfig",
    "LoopConfig",
    "LoraTuneConfig",
    "PocketError",
    "Report",
    "__version__",
    "compress",
    "distill",
    "dry_run",
    "load",
    "lora",
    "merge",
    "preset",
]
_LAZY = {
    "compress": "pocketllm.model.compress",
    "distill": "pocketllm.recover.distill",
    "dry_run": "pocketllm.model.compress",
    "load": "pocketllm.integrations.transformers",
    "lora": "pocketllm.recover.lora",
    "merge": "pocketllm.recover.merge",
    "Report": "pocketllm.model.report",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is used."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pocketllm' has no attribute {name!r}")


register_when_imported()
