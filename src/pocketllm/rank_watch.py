"""Notice at once that a process launched together with this one has failed or died.

Every rank keeps a connection to the first. Whoever closes it without saying that it is done has failed; what it has
said before that is the reason.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable

_DONE = "done"
_SECONDS = 60.0  # to connect
_GRACE = 2.0  # seconds in which the first rank may find the same error as another
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, lost probes

_handlers: list[Callable[[str], None]] = []


def on_failure(handler: Callable[[str], None] | None) -> None:
    """Set what is called, in a thread of its own, when another rank fails.

    Args:
        handler: gets the message, on the one rank that should print it; then every rank ends with exit code 1.
            Without a handler the next exchange between ranks raises RankError.
    """
    _handlers[:] = [] if handler is None else [handler]


class Watch:
    """The connections between the first rank and the others.

    Args:
        share_port: sends the port of the first rank to all; each calls it once.
    """

    def __init__(self, rank: int, size: int, share_port: Callable[[int], int]) -> None:
        self.rank, self.size = rank, size
        self._message: str | None = None
        self._found, self._ending = threading.Event(), threading.Event()
        if rank == 0:
            with socket.create_server(("", 0), backlog=size) as server:
                server.settimeout(_SECONDS)
                share_port(server.getsockname()[1])
                self._peers = dict(self._accept(server) for _ in range(size - 1))
        else:
            address = os.environ.get("MASTER_ADDR", "localhost"), share_port(0)
            peer = socket.create_connection(address, timeout=_SECONDS)
            peer.sendall(struct.pack("<I", rank))
            self._peers = {0: peer}
        self._threads = [
            threading.Thread(target=self._listen, args=(other, peer), daemon=True)
            for other, peer in self._peers.items()
        ]
        for peer, thread in zip(self._peers.values(), self._threads, strict=True):
            _keep_alive(peer)
            thread.start()

    @staticmethod
    def _accept(server: socket.socket) -> tuple[int, socket.socket]:
        peer, _ = server.accept()
        return struct.unpack("<I", peer.recv(4, socket.MSG_WAITALL))[0], peer

    def _listen(self, other: int, peer: socket.socket) -> None:
        """Read until the other side closes the connection."""
        parts = []
        try:
            while part := peer.recv(1 << 16):
                parts.append(part)
        except OSError:  # reset, or keepalive without an answer
            pass
        text = b"".join(parts).decode(errors="replace")
        if text == _DONE or self._ending.is_set():
            return
        if text and self.rank == 0 and self._ending.wait(_GRACE):
            return  # the first rank has met the same error, which it reports
        self._failed(other, text)

    def _failed(self, other: int, text: str) -> None:
        if self._found.is_set():
            return
        lost = "ended without a message (killed, or out of memory?); rerun the command to resume"
        self._message = f"rank {other} of {self.size}{f': {text}' if text else f' {lost}'}"
        self._found.set()
        reports = self.rank == 0 or (self.rank == 1 and not text)  # the first rank has died and cannot
        for handler in _handlers if reports else ():
            handler(self._message)
        if self.rank == 0:
            self._say(self._message)
        if _handlers:
            os._exit(1)  # the main thread may wait for ranks that have ended

    def failure(self) -> str | None:
        """The message about the rank that has failed; waits for it for some seconds."""
        self._found.wait(5 * _GRACE)
        return self._message

    def fail(self, text: str | None) -> None:
        """Tell the others that this rank has failed. text: None if it failed because of another rank."""
        if text is None:
            self._found.wait(5 * _GRACE)
        self._ending.set()
        self._say(text or self._message or "the connection broke off")
        if self.rank and text is not None:  # until the first rank has reported it: a launcher ends all others
            self._threads[0].join(5 * _GRACE)
        self._close()

    def close(self) -> None:
        """This rank is done."""
        self._ending.set()
        self._say(_DONE)
        self._close()

    def _say(self, text: str) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(text.encode())
                peer.shutdown(socket.SHUT_WR)
            except OSError:  # it has ended already
                continue

    def _close(self) -> None:
        for peer, thread in zip(self._peers.values(), self._threads, strict=True):
            thread.join(_GRACE)
            peer.close()


def _keep_alive(peer: socket.socket) -> None:
    """Notice within about a minute that the other machine is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
