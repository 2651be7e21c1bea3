"""Reports about compressed models: one HTML file about a model, or a table and a plot of several."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
