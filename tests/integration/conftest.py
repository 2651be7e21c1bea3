"""Fixtures that integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, served, use


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a dense and a compressed model, and nothing of them on this machine."""
    server.repositories.clear()
    server.requests.clear()
    server.add("owner/dense", source)
    server.add("owner/small", small)
    use(server, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return server
