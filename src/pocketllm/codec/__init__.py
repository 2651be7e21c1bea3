"""The method on tensors alone: cut, normalize, encode, look up, decode, pack.

Public is what `__all__` names (docs/api.md says what each is): the codec of one matrix (`MatrixCodec`), its
training (`fit`), and the parts they are made of. The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
