"""The method on tensors: cut, normalize, encode, look up, decode, pack.

The public names are those in `__all__` (docs/api.md describes each): the codec of one matrix (`MatrixCodec`), its
training (`fit`), and their parts. The modules may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
