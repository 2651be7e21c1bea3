"""Run what was compressed: packed layers, loading, decoding, export.

Public is what `__all__` names (docs/api.md describes each name); `load` and `export` stand in
`pocketllm` itself. The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
