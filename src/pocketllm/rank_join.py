"""How processes launched together find each other: a store at MASTER_ADDR, and a connection of each to the first.

The store can hold what an earlier launch has written: torchrun keeps it when it starts all processes again. So only
connections count. The first process puts its port and a random token into the store; the others connect, show the
token, and wait until the first confirms that all are there. Who reaches a process that has ended tries again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pocketllm.errors import RankError, reason_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_KEY = "pocketllm"
_NOTICE, _LIMIT = 20.0, 600.0  # seconds until a wait is reported, and until it is an error
_STEP = 0.2  # seconds between attempts
_GREETING = 2.0  # seconds in which who connects must show the token
_TOKEN_BYTES = 16
_COMPLETE = b"+"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joined:
    """token: random, the same for all of a launch. peers: a connection by rank; the first process has all."""

    token: str
    peers: dict[int, socket.socket]


def connect_store(rank: int, size: int) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT, which the first process hosts unless torchrun does.

    Raises:
        RankError: nothing listens there, or the port is in use.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = _Wait(rank, size)
    while not (is_host or _listens(host, port)):
        wait.step("the first process")
    try:
        return TCPStore(host, port, is_master=is_host, wait_for_workers=False, multi_tenant=is_host)
    except RuntimeError as error:
        raise RankError(f"{wait.where}: cannot be used ({reason_of(error)}); choose another port") from error


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_GREETING).close()
    except OSError:
        return False
    return True


def join(rank: int, size: int, store: Any) -> Joined:
    """Connect every rank to the first.

    Args:
        store: of torch.distributed; what an earlier launch has left in it does no harm.

    Raises:
        RankError: some do not come.
    """
    wait = _Wait(rank, size)
    return _join_first(rank, store, wait) if rank else _gather_others(size, store, wait)


def _gather_others(size: int, store: Any, wait: _Wait) -> Joined:
    token, peers = secrets.token_hex(_TOKEN_BYTES), dict[int, socket.socket]()
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=dual) as server:
        server.settimeout(_STEP)
        store.set(_KEY, json.dumps([server.getsockname()[1], token]))
        while missing := [rank for rank in range(1, size) if rank not in peers]:
            try:
                peer, _ = server.accept()
            except TimeoutError:
                wait.step(f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}", pause=0)
                continue
            found = _greeted(peer, token)
            if found not in range(1, size):
                peer.close()  # not one of ours
                continue
            if found in peers:  # it was started again
                peers.pop(found).close()
            peers[found] = peer
    for peer in peers.values():
        peer.sendall(_COMPLETE)
    return Joined(token, peers)


def _greeted(peer: socket.socket, token: str) -> int:
    """The rank of who has connected; -1 without the token."""
    peer.settimeout(_GREETING)
    data, size = b"", struct.calcsize("<i") + 2 * _TOKEN_BYTES
    try:
        while len(data) < size:
            part = peer.recv(size - len(data))
            if not part:
                return -1
            data += part
    except OSError:
        return -1
    return int(struct.unpack_from("<i", data)[0]) if secrets.compare_digest(data[4:], token.encode()) else -1


def _join_first(rank: int, store: Any, wait: _Wait) -> Joined:
    while True:
        if store.check([_KEY]):
            port, token = json.loads(store.get(_KEY))
            peer = _confirmed((os.environ.get("MASTER_ADDR", "localhost"), port), rank, token, wait)
            if peer is not None:
                return Joined(token, {0: peer})
        wait.step("the first process")


def _confirmed(address: tuple[str, int], rank: int, token: str, wait: _Wait) -> socket.socket | None:
    """The connection to the first process, after all have come; None if it has ended."""
    try:
        peer = socket.create_connection(address, timeout=_GREETING)
        peer.sendall(struct.pack("<i", rank) + token.encode())
        while True:
            try:
                if peer.recv(1) == _COMPLETE:
                    return peer
                break
            except TimeoutError:
                wait.step("all processes", pause=0)
    except OSError:
        return None
    peer.close()
    return None


@dataclass
class _Wait:
    """A wait for other processes: reported after some seconds, an error after minutes."""

    rank: int
    size: int
    started: float = field(default_factory=time.monotonic)
    is_reported: bool = False

    @property
    def where(self) -> str:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return f"rank {self.rank} of {self.size}: {address} (MASTER_ADDR, MASTER_PORT)"

    def step(self, who: str, pause: float = _STEP) -> None:
        """Wait a little longer for somebody.

        Raises:
            RankError: for too long.
        """
        waited = time.monotonic() - self.started
        if waited > _NOTICE and not self.is_reported:
            self.is_reported = True
            logger.warning("%s: waiting for %s", self.where, who)
        if waited > _LIMIT:
            raise RankError(
                f"{self.where}: waited {_LIMIT:.0f} seconds for {who}; start all {self.size} processes, each with "
                "the same address and a RANK of its own"
            )
        time.sleep(pause)
