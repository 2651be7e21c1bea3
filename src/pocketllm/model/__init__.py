"""The method applied to a model: plan, compress, store, load."""
