"""Engines of other projects that run compressed models: servers with an OpenAI-compatible API.

Each needs packages of its own, and is imported only when it is used.
"""
