"""The sample backend: its work, its manners, and the end of its life."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import server
import synchronization_server

FOLDER = Path(server.__file__).parent


@pytest.mark.parametrize(
    ("limit", "primes"),
    [(-5, 0), (0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (9, 4), (10, 4), (25, 9), (100, 25), (121, 30), (7919, 1000)],
)
def test_primes_are_counted_up_to_and_including_the_limit(limit: int, primes: int) -> None:
    assert server.count_primes(limit) == primes


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("", 200, "303 primes up to 2000"),
        ("?limit=0", 200, "0 primes up to 0"),
        ("?limit=100", 200, "25 primes up to 100"),
        ("?limit=1000000", 200, "78498 primes up to 1000000"),
        ("?limit=1000001", 400, "limit goes from 0 to 1000000"),
        ("?limit=-1", 400, "limit goes from 0"),
        ("?limit=many", 400, "limit takes a whole number"),
        ("?limit=1.5", 400, "limit takes a whole number"),
        ("?limit=", 400, "limit takes a whole number"),
        ("?limit=1e3", 400, "limit takes a whole number"),
        ("?seconds=0.1", 200, ".\nvm at"),
        ("?seconds=60.1", 400, "seconds from 0 to 60"),
        ("?seconds=-1", 400, "seconds from 0 to 60"),
        ("?seconds=nan", 400, "seconds from 0 to 60"),
        ("?seconds=inf", 400, "seconds from 0 to 60"),
        ("?seconds=soon", 400, "seconds a number"),
    ],
)
def test_a_request_is_answered_in_bounds_and_nonsense_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, query: str, status: int, says: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    answer = server.app.test_client().get(f"/{query}")
    assert answer.status_code == status
    assert says in answer.text
    assert answer.text.endswith("\n")
    assert answer.text.count("\n") == (2 if query == "?seconds=0.1" else 1)


def test_the_line_names_the_backend_its_address_and_the_visitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "lbscaler-backend-1")
    monkeypatch.setattr(socket, "gethostbyname", {"lbscaler-backend-1": "198.18.0.2"}.__getitem__)
    visitor = server.app.test_client()
    answer = visitor.get("/?limit=10", environ_base={"REMOTE_ADDR": "203.0.113.9"})
    assert answer.text == "lbscaler-backend-1 at 198.18.0.2: 4 primes up to 10, for 203.0.113.9\n"


def test_a_backend_whose_name_has_no_address_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_name: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert " at no address: " in server.app.test_client().get("/").text


@pytest.mark.parametrize(
    ("listening", "draining", "status", "word"),
    [
        (True, False, 200, "ready\n"),
        (False, False, 503, "starting\n"),
        (True, True, 503, "draining\n"),
        (False, True, 503, "draining\n"),
    ],
)
def test_sync_says_ready_only_while_the_workload_listens_and_nobody_ends_it(
    monkeypatch: pytest.MonkeyPatch, listening: bool, draining: bool, status: int, word: str
) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if listening:
            door.listen()
        check = synchronization_server.workload_accepts
        monkeypatch.setattr(synchronization_server, "workload_accepts", lambda: check(door.getsockname()[1]))
        if draining:
            synchronization_server.draining.set()
        try:
            answer = synchronization_server.app.test_client().get("/sync")
        finally:
            synchronization_server.draining.clear()
    assert (answer.status_code, answer.text) == (status, word)


# -- the whole process -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextlib.contextmanager
def backend(linger: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """server.py as a process, on a port of its own, once it answers."""
    port = free_port()
    code = f"import server; server.PORT, server.LINGER = {port}, {linger}; server.main()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while not synchronization_server.workload_accepts(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_after_sigterm_the_request_in_hand_is_finished_while_the_door_is_closed() -> None:
    with backend(linger=0.1) as (process, port):
        url = f"http://127.0.0.1:{port}/?seconds=1"
        with requests.get(url, stream=True, timeout=10) as answer:
            body = answer.iter_content(None)
            first = next(body)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # told twice, it ends once
            time.sleep(0.3)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            text = (first + b"".join(body)).decode()
        assert re.fullmatch(r"\.{10}\n\S+ at .+: 303 primes up to 2000, for 127.0.0.1\n", text)
        assert process.wait(5) == 0


def test_while_it_lingers_it_still_answers_new_and_kept_connections_and_lets_them_go() -> None:
    with backend(linger=2.0) as (process, port), requests.Session() as kept:
        url = f"http://127.0.0.1:{port}/?limit=10"
        assert kept.get(url, timeout=5).headers.get("Connection", "keep-alive") == "keep-alive"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        for answer in (kept.get(url, timeout=5), requests.get(url, timeout=5)):
            assert (answer.status_code, answer.headers.get("Connection")) == (200, "close")
