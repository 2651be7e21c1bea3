"""Measure the inputs of each layer and what its errors cost: input Hessians, gradients, sensitivity.

Public is what `__all__` names (docs/api.md describes each name). The modules within may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
