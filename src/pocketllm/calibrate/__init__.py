"""Measure the inputs of each layer and what its errors cost: input Hessians, gradients, sensitivity.

The public names are those in `__all__` (docs/api.md describes each). The modules may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
