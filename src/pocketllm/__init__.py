"""PocketLLM: compress the weights of language models 4 to 10 times (relative to bf16) and run the result.

    import pocketllm
    pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    model, tokenizer = pocketllm.load("out")

Importing the package registers the format with transformers (when transformers is imported later, too), so
`AutoModelForCausalLM.from_pretrained("out")` works as well. Method: arXiv 2511.17637.
"""

from __future__ import annotations

import lazy_loader

from pocketllm_startup import register_when_imported

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_imported()
