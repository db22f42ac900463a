"""A TCP proxy on this machine, whose link can be cut and restored."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

CHUNK = 65_536  # bytes


class Link:
    """A TCP proxy between a SuperNode and a SuperLink. Use it as a context manager.

    Args:
        port: the port of the SuperLink on 127.0.0.1.

    Attributes:
        port: the port of the proxy.
        passed: bytes that were passed on, in both directions.
        resets: how often all connections were reset.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._left: int | None = None  # bytes until the next reset
        self.port = int(self._listener.getsockname()[1])
        self.passed = 0
        self.resets = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self.restore()
        self.reset()

    def cut(self) -> None:
        """Pass nothing on. As with a cut cable, no side is told."""
        self._flowing.clear()

    def restore(self) -> None:
        """Pass on again, first what was sent in between."""
        self._flowing.set()

    def reset(self) -> None:
        """Reset all connections."""
        self.resets += 1
        for connection in list(self._open):
            self._close(connection)

    def reset_after(self, size: int) -> None:
        """Reset all connections when so many more bytes have passed."""
        self._left = size

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._open |= {near, far}
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self._flowing.wait()
                if self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left = None
                        self.reset()
                        return
                target.sendall(data)
                self.passed += len(data)
        self._close(source)
        self._close(target)

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
