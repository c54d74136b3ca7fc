"""The client as a process in a namespace, with a manager in another: its reports, its health check, its rules."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, connect
from netns.test_failures import eventually

CLIENT = Path(__file__).parents[2] / "balancer" / "synchronization_client.py"
MANAGER = "198.18.0.2"
FROZEN, TWO, THREE = "198.18.1.1", "198.18.1.2", "198.18.1.3"
SERVICE = {
    **{"port": 8000, "health": "tcp", "interval": 0.5, "drain_timeout": 30},
    "weights": "adaptive",
}


class Manager:
    """Answers the balancer's calls in a namespace, and keeps its reports."""

    def __init__(self, namespace: Namespace) -> None:
        self.snapshot: dict[str, Any] = {}
        self.reports: list[dict[str, Any]] = []
        self.stops: list[dict[str, Any]] = []
        self.polls: list[float] = []
        self.ending = False
        manager = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                manager.polls.append(time.monotonic())
                known = f"have={manager.snapshot['revision']}&" in self.path
                if known and not manager.ending:
                    time.sleep(0.3)
                self.answer(503 if manager.ending else 204 if known else 200, manager.snapshot)

            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                (manager.reports if self.path == "/pkts_info" else manager.stops).append(message)
                self.answer(200, {})

            def answer(self, status: int, message: dict[str, Any]) -> None:
                body = b"" if status == 204 else json.dumps(message).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        with namespace:
            self._server = ThreadingHTTPServer((MANAGER, 5000), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def want(self, revision: str, states: Mapping[str, str]) -> None:
        """Backends as address → state."""
        backends = [{"id": ip, "ip": ip, "state": state} for ip, state in states.items()]
        self.snapshot = {"revision": revision, "service": SERVICE, "backends": backends}

    def row(self, ip: str) -> dict[str, Any]:
        """The row of a backend in the last report."""
        assert self.reports
        rows = [row for row in self.reports[-1]["backends"] if row["ip"] == ip]
        assert rows
        return dict(rows[0])

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def manager(lab: Lab) -> Iterator[Manager]:
    made = Manager(lab.add(MANAGER))
    yield made
    made.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def log(balancer: Balancer, tmp_path: Path) -> Iterator[Path]:
    """The log of a client that runs in the balancer's namespace, over the first rules."""
    balancer.dispatch_over()
    balancer.namespace.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=60000 65535")
    path = tmp_path / "log"
    flavour = str(balancer.netfilter._restore).split("-")[1]  # type: ignore[attr-defined]
    (tmp_path / "token").write_text("secret")
    variables = {"IPTABLES": flavour, "LB_MANAGERS": f"{MANAGER}:5000", "LB_TOKEN_FILE": str(tmp_path / "token")}
    environment = os.environ | variables
    with path.open("w") as file, balancer.namespace:
        process = subprocess.Popen([sys.executable, str(CLIENT)], stdout=file, stderr=file, env=environment)
    yield path
    process.kill()
    process.wait()


def fetch(balancer: Balancer) -> tuple[int, str]:
    """The status and the body of the health check; 0 while nothing listens yet."""
    try:
        with connect(balancer.namespace, ("127.0.0.1", 5000)) as connection:
            connection.sendall(b"GET /sync HTTP/1.0\r\n\r\n")
            head, _, body = connection.makefile(newline="").read().partition("\r\n\r\n")
    except ConnectionRefusedError:
        return 0, ""
    return int(head.split()[1]), body


def answer(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(100)
        connection.sendall(b"+OK\r\n")


def test_health_check_without_a_manager_passes_only_while_the_rules_lead_to_a_backend(
    log: Path, balancer: Balancer
) -> None:
    eventually(lambda: _equal(fetch(balancer)[0], 503), 10)
    balancer.dispatch_over(TWO)
    eventually(lambda: _equal(fetch(balancer)[0], 200), 10)
    balancer.apply("*nat\n-F PREROUTING\nCOMMIT\n")
    eventually(lambda: _equal(fetch(balancer)[0], 503), 10)
    body = fetch(balancer)[1]
    assert (json.loads(body)["loops_alive"], json.loads(body)["rules_in_place"]) == (True, False)
    assert "manager unreachable" in log.read_text()


def test_frozen_backend_is_ejected_and_a_drained_one_is_stopped(
    lab: Lab, log: Path, client: Namespace, balancer: Balancer, manager: Manager, stack: contextlib.ExitStack
) -> None:
    backends = lab.add(FROZEN, TWO, THREE)
    with backends:
        stack.enter_context(socket.create_server((FROZEN, 8000), backlog=1000))  # its kernel accepts
    for ip in (TWO, THREE):
        Server(backends, ip, talk=answer, greet=False)
    manager.want("r1", {FROZEN: "active", TWO: "active", THREE: "active"})
    eventually(lambda: _equal(manager.row(FROZEN)["healthy"], True), 20)
    eventually(lambda: _assert(manager.row(TWO)["share"] > 0.2), 20)

    deadline = time.monotonic() + 60
    while manager.row(FROZEN).get("cause") != "no_first_reply":
        assert time.monotonic() < deadline, log.read_text()
        connection = stack.enter_context(connect(client, VIP))
        connection.sendall(b"PING\r\n")
        time.sleep(0.1)
    eventually(lambda: _equal(manager.row(FROZEN)["share"], 0.0))
    row = manager.row(FROZEN)
    assert row["healthy"] is False
    assert "connections wait for a first reply" in row["why"]
    report = manager.reports[-1]
    assert (report["panic"], report["findings"]) == (False, [])
    assert report["uptime"] > 10
    before = balancer.connections()[FROZEN]
    for _ in range(30):
        with connect(client, VIP) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(10) == b"+OK\r\n"
    assert balancer.connections()[FROZEN] == before
    tracked = balancer.namespace.run("conntrack", "-L", "-p", "tcp")
    # Of each connection the original tuple: a masqueraded client may have 5000 in the reply's by chance.
    own = re.findall(r"^tcp +\d+ +\d+ \S+ src=\S+ dst=\S+ sport=\d+ dport=5000 .*", tracked, re.MULTILINE)
    assert own == [], "probes, reports and long polls are not tracked"

    stack.close()
    manager.want("r2", {FROZEN: "active", TWO: "active", THREE: "draining"})
    eventually(lambda: _assert([stop["ip"] for stop in manager.stops[:1]] == [THREE]), 10)
    assert manager.stops[0]["reason"].startswith("drained in ")
    assert "ERROR" not in log.read_text(), log.read_text()


def test_manager_that_shuts_down_gets_few_requests(log: Path, balancer: Balancer, manager: Manager) -> None:
    manager.want("r1", {})
    eventually(lambda: _assert(bool(manager.polls)), 20)
    manager.ending = True
    time.sleep(0.5)
    first = len(manager.polls)
    time.sleep(3.0)
    assert 2 <= len(manager.polls) - first <= 15
    assert log.read_text().count("manager unreachable") == 1


def _assert(truth: bool) -> None:
    assert truth


def _equal(seen: object, expected: object) -> None:
    assert seen == expected
