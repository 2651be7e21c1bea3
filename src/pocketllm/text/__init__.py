"""Reading text: files, folders, Hub data sets and instructions, and cutting their tokens into windows.

The public names are those in `__all__`; docs/api.md describes them. Everything else may change without notice.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
