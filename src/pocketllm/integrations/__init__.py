"""Plug-ins for other libraries, imported lazily."""
