"""Runs a server in a thread, for the tests of what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


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
