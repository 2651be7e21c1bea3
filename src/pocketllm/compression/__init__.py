"""The pipeline: fit codecs, encode matrices, write the checkpoint.

The public names are those in `__all__` (docs/api.md describes each); `compress` and `dry_run` are in `pocketllm`
itself. The modules may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
