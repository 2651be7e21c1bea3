"""PocketLLM: compress the weights of language models 8 to 20 times and run the result.

    import pocketllm
    pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    model, tokenizer = pocketllm.load("out")

Importing the package registers the format with transformers (when transformers is imported later, too), so
`AutoModelForCausalLM.from_pretrained("out")` works as well. Method: arXiv 2511.17637.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.evaluate.generate import generate
    from pocketllm.evaluate.measure import measure
    from pocketllm.evaluate.perplexity import perplexity
    from pocketllm.integrations.transformers import load
    from pocketllm.model.compress import compress, dry_run
    from pocketllm.model.export import export
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
    "export",
    "generate",
    "load",
    "lora",
    "measure",
    "merge",
    "perplexity",
    "preset",
]
if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".evaluate.generate": ["generate"],
            ".evaluate.measure": ["measure"],
            ".evaluate.perplexity": ["perplexity"],
            ".integrations.transformers": ["load"],
            ".model.compress": ["compress", "dry_run"],
            ".model.export": ["export"],
            ".model.report": ["Report"],
            ".recover.distill": ["distill"],
            ".recover.lora": ["lora"],
            ".recover.merge": ["merge"],
        },
    )

register_when_imported()
