"""Runs a server in a thread, for the tests of what it answers, and clients that try to block a server."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

RESET = struct.pack("ii", 1, 0)  # the value of SO_LINGER with which `close` resets the connection
CHUNKED = b"POST /ready HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
# What a client sends first, and what it then repeats.
WITHOUT_PAUSE = [
    (b"", b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    (CHUNKED, b"1\r\nx\r\n"),
    (CHUNKED + b"0\r\n", b"trailer: x\r\n"),
]


@contextmanager
def without_pause(port: int, begun: bytes, repeated: bytes) -> Iterator[None]:
    """A client that sends as fast as it can, and reads the answers."""

    def send() -> None:
        with suppress(OSError):
            client.sendall(begun)
            while True:
                client.sendall(repeated * 5000)

    def read() -> None:
        with suppress(OSError):
            while client.recv(1 << 20):
                pass

    with socket.create_connection(("127.0.0.1", port)) as client:
        threads = [threading.Thread(target=send), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with suppress(OSError):  # the server has closed it
                client.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def in_thread(make: Callable[[], Any]) -> tuple[int, Callable[[], None]]:
    """Starts a server of gevent in a thread with its own event loop. Returns its port, and a function that ends it."""
    begun, made = threading.Event(), []

    def serve() -> None:
        server = make()
        server.start()
        watcher = server.loop.async_()
        watcher.start(server._stop_event.set)
        made.extend([server.server_port, watcher])
        begun.set()
        server.serve_forever()
        watcher.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert begun.wait(10)

    def end() -> None:
        made[1].send()
        thread.join(10)
        assert not thread.is_alive()

    return made[0], end
