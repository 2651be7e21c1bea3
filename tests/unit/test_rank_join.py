"""How processes find each other and notice who hangs; test_ranks.py has real processes."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from pocketllm import rank_join, rank_watch
from pocketllm.errors import ConfigError, RankError
from pocketllm.rank_join import connect_store, join
from pocketllm.rank_watch import Watch
from pocketllm.ranks import joined


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The environment of one of three processes; the port, on which nothing listens."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rank_join, "_STEP", 0.01)
    yield port


def test_what_an_earlier_launch_has_left_in_the_store_does_no_harm(launcher: int) -> None:
    store, is_read = dist.HashStore(), threading.Event()
    store.set(rank_join._KEY, json.dumps([launcher, "0" * 32]))  # of a process that has ended

    class Read:
        def check(self, keys: list[str]) -> bool:
            return bool(store.check(keys))

        def get(self, key: str) -> bytes:
            is_read.set()
            return bytes(store.get(key))

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(join, rank, 3, Read()) for rank in (1, 2)]
        assert is_read.wait(10)
        first = join(0, 3, store)
        found = [other.result() for other in others]
    assert set(first.peers) == {1, 2} and {other.token for other in found} == {first.token}
    for number, other in enumerate(found, start=1):
        other.peers[0].sendall(bytes([number]))
        assert first.peers[number].recv(1) == bytes([number])
    for peer in (*first.peers.values(), *(other.peers[0] for other in found)):
        peer.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\1\0\0\0" + b"x" * 32, b"\7\0\0\0" + b"t" * 32]
)
def test_who_does_not_know_the_token_is_turned_away(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a rank that cannot be."""
    monkeypatch.setattr(rank_join.secrets, "token_hex", lambda size: "t" * 2 * size)
    store = dist.HashStore()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(join, 0, 2, store)
        store.wait([rank_join._KEY])
        address = "localhost", json.loads(store.get(rank_join._KEY))[0]
        with socket.create_connection(address) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        second = join(1, 2, store)
        assert set(first.result().peers) == {1}
    second.peers[0].close()
    first.result().peers[1].close()


def test_a_rank_that_connects_again_replaces_its_earlier_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_join.secrets, "token_hex", lambda size: "t" * 2 * size)
    store = dist.HashStore()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(join, 0, 3, store)
        store.wait([rank_join._KEY])
        address = "localhost", json.loads(store.get(rank_join._KEY))[0]
        with socket.create_connection(address) as ended:
            ended.sendall(b"\1\0\0\0" + b"t" * 32)
            again = pool.submit(join, 1, 3, store)
            assert ended.recv(1) == b""
        others = [again.result, pool.submit(join, 2, 3, store).result]
        found = [other() for other in others]
    for peer in (*first.result().peers.values(), *(other.peers[0] for other in found)):
        peer.close()


@pytest.mark.parametrize(
    ("rank", "whom"), [(0, "ranks 1, 2"), (1, "the first process")], ids=["the first", "another"]
)
def test_a_wait_is_reported_and_ends(
    rank: int, whom: str, launcher: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_join, "_NOTICE", 0)
    monkeypatch.setattr(rank_join, "_LIMIT", 0.1)
    where = f"rank {rank} of 3: localhost:{launcher} (MASTER_ADDR, MASTER_PORT)"
    with pytest.raises(RankError) as raised, caplog.at_level(logging.WARNING):
        join(rank, 3, dist.HashStore())
    assert str(raised.value).startswith(
        f"{where}: waited 0 seconds for {whom}; start all 3 processes, each with"
    )
    assert caplog.messages == [f"{where}: waiting for {whom}"]


def test_no_store_at_the_address(launcher: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_join, "_LIMIT", 0.05)
    with pytest.raises(RankError, match="waited 0 seconds for the first process"):
        connect_store(1, 2)
    with (
        socket.create_server(("localhost", launcher)),
        pytest.raises(
            RankError, match=r"MASTER_PORT\): cannot be used \(.*EADDRINUSE.*\); choose another port"
        ),
    ):
        connect_store(0, 2)
    store = connect_store(0, 2)
    store.set("a", "b")
    assert connect_store(1, 2).get("a") == b"b"


def test_a_rank_without_a_sign_of_life_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is busy has a thread that gives it."""
    monkeypatch.setattr(rank_watch, "_BEAT_SECONDS", 0.05)
    rank_watch.on_failure(None)
    (here, silent), (one, other) = socket.socketpair(), socket.socketpair()
    waits, first, busy = Watch(0, 2, {1: here}, 1.0), Watch(0, 2, {1: one}, 1.0), Watch(1, 2, {0: other}, 1.0)
    lost = "rank 1 of 2 gave no sign of life for 1 seconds (stopped, or its machine was lost?); rerun the"
    assert str(waits.failure()).startswith(lost)
    assert not first._found.is_set() and not busy._found.is_set()
    with ThreadPoolExecutor() as pool:
        list(pool.map(Watch.close, (busy, first, waits)))
    silent.close()


def test_a_time_limit_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "POCKETLLM_RANK_TIMEOUT": "soon"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match="POCKETLLM_RANK_TIMEOUT: got 'soon', wanted a number from 5; unset"),
        joined(),
    ):
        pass
