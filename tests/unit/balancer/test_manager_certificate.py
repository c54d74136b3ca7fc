"""The manager's certificate and its addresses, as a balancer of a Swarm uses them."""

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

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # a server ends during a TLS handshake


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
        pass  # clients that reject the certificate close the connection


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
def manager(pem: Path) -> Iterator[str]:
    yield from serve(pem)


def test_manager_is_accepted_by_its_certificate_at_any_address(pem: Path, manager: str) -> None:
    assert ManagerClient([manager], lambda: "t", str(pem)).sync("") == {"revision": "r2"}


def test_other_certificates_and_names_are_rejected(tmp_path: Path, manager: str) -> None:
    other = certificate(tmp_path / "other", "lbscaler-manager")
    with pytest.raises(requests.exceptions.SSLError):
        ManagerClient([manager], lambda: "t", str(other)).sync("")
    foreign = certificate(tmp_path / "foreign", "another-name")
    for address in serve(foreign):
        with pytest.raises(requests.exceptions.SSLError):
            ManagerClient([address], lambda: "t", str(foreign)).sync("")


def test_next_address_is_tried_after_a_failure_and_kept_after_a_success(pem: Path, manager: str) -> None:
    client = ManagerClient(["127.0.0.1:1", "127.0.0.1:2", manager], lambda: "t", str(pem))
    for _ in range(2):
        with pytest.raises(requests.RequestException):
            client.sync("")
    assert client.sync("") == client.sync("") == {"revision": "r2"}
