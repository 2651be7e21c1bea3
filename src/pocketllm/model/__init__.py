"""The method on a whole model: open it, plan, read what compression made of it.

Public is what `__all__` names (docs/api.md says what each is); `compress`, `dry_run`, `export` and `Report` stand
in `pocketllm` itself. The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
