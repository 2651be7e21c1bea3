"""How good a model is: perplexity, divergence from the dense model, zero-shot tasks, what it writes.

Public is what `__all__` names (docs/api.md says what each is); `perplexity`, `generate` and `measure` stand in
`pocketllm` itself. The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
