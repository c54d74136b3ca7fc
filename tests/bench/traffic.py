"""What balancers on other nodes cost their manager besides the rows of their reports: bytes and time.

    python tests/bench/traffic.py

The manager's own listener for nodes, within TLS, and the balancer's own calls, through a relay on loopback that counts
bytes (TCP's and IP's headers not among them). Needs openssl.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "balancer"))
from simulate import Site, answer

import manager_client
from certificates import make_certificate
from fakes import TOKEN
from manager_client import ManagerClient
from web.app import create_app, waits_in
from web.listeners import Listeners, bind_tcp, raise_file_limit, tls_context

CALLS, POLL, POLLS = 300, 4.0, 500
# What a balancer in a process of its own calls, so that the manager's time is told apart from its.
CLIENT = """
import sys, manager_client
manager = manager_client.ManagerClient([sys.argv[1]], lambda: sys.argv[2], sys.argv[3])
for _ in range({}):
    manager.report({})
"""


class Relay:
    """Passes on what comes, and counts it: `up` to the manager and `down` from it."""

    def __init__(self, manager: int) -> None:
        self._manager, self.passed = manager, {"up": 0, "down": 0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            balancer, manager = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._manager))
            for way, here, there in (("up", balancer, manager), ("down", manager, balancer)):
                threading.Thread(target=self._pass_on, args=(way, here, there), daemon=True).start()

    def _pass_on(self, way: str, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                self.passed[way] += len(data)
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)

    def count(self, call: Callable[[], Any]) -> str:
        self.passed.update(up=0, down=0)
        call()
        time.sleep(0.3)  # for the last words of both
        return "{up} bytes up, {down} down".format(**self.passed)


def of_a_report(address: str, pem: str, report: dict[str, Any]) -> float:
    """Milliseconds of this process's time for each report that another sends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(manager_client.__file__).parent)}
    argv = [sys.executable, "-c", CLIENT.format(CALLS, report), address, TOKEN, pem]
    began = time.process_time()
    subprocess.run(argv, check=True, env=environment)
    return 1000 * (time.process_time() - began) / CALLS


class Waiting:
    """Waits for a view as the manager does, and counts who waits."""

    def __init__(self, listeners: Listeners, site: Site) -> None:
        self._wait, self.count = waits_in(listeners, site.controller), 0

    def __call__(self, have: str, seconds: float) -> dict[str, Any] | None:
        self.count += 1
        try:
            return self._wait(have, seconds)
        finally:
            self.count -= 1


def under(
    polls: int, waiting: Waiting, revision: str, connect: Callable[[], ManagerClient], report: dict[str, Any]
) -> float:
    """Seconds a report takes while so many long polls wait."""
    balancers = [threading.Thread(target=lambda: connect().sync(revision)) for _ in range(polls)]
    for thread in balancers:
        thread.start()
    while waiting.count < polls:
        time.sleep(0.01)
    began = time.monotonic()
    connect().report(report)
    took = time.monotonic() - began
    for thread in balancers:
        thread.join()
    return took


def main() -> int:
    logging.disable()
    raise_file_limit()
    manager_client.LONG_POLL = POLL
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        pem, site, listeners = make_certificate(place), Site(1, 30, 30, place), Listeners()
        waiting, listener = Waiting(listeners, site), bind_tcp("127.0.0.1", 0)
        port = listener.getsockname()[1]
        listeners.add(listener, create_app(site.controller, TOKEN, [], waiting), tls_context(pem))
        listeners.start()
        address = f"127.0.0.1:{port}"
        relay = Relay(port)
        relayed = ManagerClient([f"127.0.0.1:{relay.port}"], lambda: TOKEN, str(pem))
        empty, view = {**site.message(0, 1), "backends": []}, site.controller.wait_for_snapshot("", 0)
        revision = view["revision"]
        print("report without rows:", relay.count(lambda: relayed.report(empty)))
        print(f"view of {len(answer(view))} bytes:", relay.count(lambda: relayed.sync("")))
        print("poll without a change:", relay.count(lambda: relayed.sync(revision)))
        print(f"manager's time for a report without rows: {of_a_report(address, str(pem), empty):.2f} ms")
        took = under(POLLS, waiting, revision, lambda: ManagerClient([address], lambda: TOKEN, str(pem)), empty)
        print(f"a report while {POLLS} polls of {POLL:g} s wait: {took:.2f} s")
    return 0


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # the relay's threads wait for calls for ever
