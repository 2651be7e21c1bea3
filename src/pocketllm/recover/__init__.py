"""Get the accuracy back: distillation into the compressed form, and LoRA beside it.

Public is what `__all__` names (docs/api.md says what each is); `distill`, `lora` and `merge` stand in `pocketllm`
itself. The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
