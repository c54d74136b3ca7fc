"""A balancer among others: which backends are near, where the manager may be, and which one it believes."""

from __future__ import annotations

import shutil
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from certificates import make_certificate
from manager_client import ManagerClient
from rotation import rotation
from snapshot import Backend, Snapshot

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # a server ends with a TLS client half-way


def shares(locality: str, node: str, *nodes: str, unhealthy: str = "") -> list[float]:
    backends = tuple(Backend(f"b{i}", f"198.18.0.{i + 2}", "active", 2.0, name) for i, name in enumerate(nodes))
    healthy: dict[str, bool | None] = {b.id: b.id != unhealthy for b in backends}
    return [e.weight for e in rotation(Snapshot("r", backends, locality=locality), healthy, node).endpoints]


@pytest.mark.parametrize(
    ("locality", "node", "nodes", "weights"),
    [
        ("prefer", "n1", ("n1", "n2", "n1"), [2.0, 0.2, 2.0]),
        ("prefer", "n3", ("n1", "n2"), [2.0, 2.0]),  # none is near
        ("", "n1", ("n1", "n2"), [2.0, 2.0]),
        ("", "", ("", ""), [2.0, 2.0]),
    ],
)
def test_what_is_far_gets_little_where_near_is_preferred(
    locality: str, node: str, nodes: tuple[str, ...], weights: list[float]
) -> None:
    assert shares(locality, node, *nodes) == pytest.approx(weights)


def test_an_unhealthy_near_backend_makes_nobody_far() -> None:
    assert shares("prefer", "n1", "n1", "n2", "n3", unhealthy="b0") == [2.0, 2.0]


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"revision": "r2"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Quiet(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # who does not believe us hangs up


def certificate(place: Path, name: str) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    return make_certificate(place, name)


def serve(pem: Path) -> Iterator[str]:
    with Quiet(("127.0.0.1", 0), Answers) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return certificate(tmp_path / "ours", "lbscaler-manager")


@pytest.fixture
def door(pem: Path) -> Iterator[str]:
    yield from serve(pem)


def test_the_manager_is_known_by_its_certificate_at_whatever_address(pem: Path, door: str) -> None:
    assert ManagerClient([door], "t", "b", str(pem)).sync("") == {"revision": "r2"}


def test_another_certificate_is_not_believed_nor_one_of_another_name(tmp_path: Path, door: str) -> None:
    other = certificate(tmp_path / "other", "lbscaler-manager")
    with pytest.raises(requests.exceptions.SSLError):
        ManagerClient([door], "t", "b", str(other)).sync("")
    strange = certificate(tmp_path / "strange", "somebody-else")
    for address in serve(strange):
        with pytest.raises(requests.exceptions.SSLError):
            ManagerClient([address], "t", "b", str(strange)).sync("")


def test_the_next_address_is_tried_when_one_does_not_answer_and_kept_when_it_does(pem: Path, door: str) -> None:
    manager = ManagerClient(["127.0.0.1:1", "127.0.0.1:2", door], "t", "b", str(pem))
    for _ in range(2):
        with pytest.raises(requests.RequestException):
            manager.sync("")
    assert manager.sync("") == manager.sync("") == {"revision": "r2"}
