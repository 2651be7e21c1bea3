"""Notice that a process launched together with this one has failed, died or stopped.

Every rank keeps a connection to the first. Whoever closes it without saying that it is done has failed; what it has
said before that is the reason. A thread of every rank sends a byte each second: whoever is silent for long hangs.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

_DONE = "done"
_GRACE = 2.0  # seconds in which the first rank may find the same error as another
_BEAT, _BEAT_SECONDS = b"\0", 1.0

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
        peers: by rank; see `rank_join`. timeout: seconds without a sign of life after which a rank has failed.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, socket.socket], timeout: float) -> None:
        self.rank, self.size, self._peers, self.timeout = rank, size, peers, timeout
        self._message: str | None = None
        self._found, self._ending = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, args=(other, peer), daemon=True)
            for other, peer in peers.items()
        ]
        for peer, thread in zip(peers.values(), self._threads, strict=True):
            peer.settimeout(timeout)
            thread.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        """Show the others that this process runs."""
        while not self._ending.wait(_BEAT_SECONDS):
            for peer in self._peers.values():
                try:
                    peer.sendall(_BEAT)
                except OSError:  # it has ended, which `_listen` notices
                    continue

    def _listen(self, other: int, peer: socket.socket) -> None:
        """Read until the other side closes the connection, or is silent for too long."""
        said, is_silent = bytearray(), False
        try:
            while part := peer.recv(1 << 16):
                said += part.replace(_BEAT, b"")
        except TimeoutError:
            is_silent = True
        except OSError:  # reset
            pass
        text = said.decode(errors="replace")
        if text == _DONE or self._ending.is_set():
            return
        if text and self.rank == 0 and self._ending.wait(_GRACE):
            return  # the first rank has met the same error, which it reports
        self._failed(other, text, is_silent)

    def _failed(self, other: int, text: str, is_silent: bool) -> None:
        if self._found.is_set():
            return
        lost = "ended without a message (killed, or out of memory?)"
        if is_silent:
            lost = f"gave no sign of life for {self.timeout:g} seconds (stopped, or its machine was lost?)"
        self._message = (
            f"rank {other} of {self.size}{f': {text}' if text else f' {lost}; rerun the command to resume'}"
        )
        self._found.set()
        reports = self.rank == 0 or (self.rank == 1 and not text)  # the first rank has failed and cannot
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
