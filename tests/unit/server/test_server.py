"""The sample backend: its work, its limits, its reports to the balancer, and how it stops."""

from __future__ import annotations

import contextlib
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import gevent.socket
import pytest
import requests
from gevent.event import Event
from werkzeug.test import Client, TestResponse

import limited_server
import server
import synchronization_server
from servers import RESET, WITHOUT_PAUSE, without_pause
from synchronization_server import Readiness, Workload

FOLDER = Path(server.__file__).parent
REQUEST = b"GET /?limit=10 HTTP/1.1\r\nHost: backend\r\n\r\n"


@pytest.fixture(autouse=True)
def fresh_address() -> Iterator[None]:
    server.own_address.cache_clear()
    yield
    server.own_address.cache_clear()


@pytest.mark.parametrize(
    ("limit", "primes"),
    [(-5, 0), (0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (9, 4), (10, 4), (25, 9), (100, 25), (121, 30), (7919, 1000)],
)
def test_primes_are_counted_up_to_and_including_the_limit(limit: int, primes: int) -> None:
    assert server.count_primes(limit) == primes


def get(path: str) -> TestResponse:
    return Client(server.workload).get(path, environ_base={"REMOTE_ADDR": "203.0.113.9"})


@pytest.mark.parametrize(
    ("query", "status", "line"),
    [
        ("", 200, "303 primes up to 2000"),
        ("?limit=0", 200, "0 primes up to 0"),
        ("?limit=100", 200, "25 primes up to 100"),
        ("?limit=1000000", 200, "78498 primes up to 1000000"),
        ("?limit=1000001", 400, "limit must be from 0 to 1000000"),
        ("?limit=-1", 400, "limit must be from 0"),
        ("?limit=many", 400, "limit must be a whole number"),
        ("?limit=1.5", 400, "limit must be a whole number"),
        ("?limit=", 400, "limit must be a whole number"),
        ("?limit=1e3", 400, "limit must be a whole number"),
        ("?seconds=0.1", 200, ".\nvm at"),
        ("?seconds=60.1", 400, "seconds from 0 to 60"),
        ("?seconds=-1", 400, "seconds from 0 to 60"),
        ("?seconds=nan", 400, "seconds from 0 to 60"),
        ("?seconds=inf", 400, "seconds from 0 to 60"),
        ("?seconds=soon", 400, "seconds a number"),
    ],
)
def test_valid_parameters_are_answered_and_invalid_ones_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, query: str, status: int, line: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    answer = get(f"/{query}")
    assert answer.status_code == status
    assert line in answer.text
    assert answer.text.endswith("\n")
    assert answer.text.count("\n") == (2 if query == "?seconds=0.1" else 1)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/other", 404), ("POST", "/", 405), ("HEAD", "/?seconds=9", 200)]
)
def test_other_paths_and_methods_are_refused_and_head_is_answered_without_delay(
    method: str, path: str, status: int
) -> None:
    answer = Client(server.workload).open(path, method=method, environ_base={"REMOTE_ADDR": "203.0.113.9"})
    assert answer.status_code == status
    assert answer.content_length


def test_answer_names_the_backend_its_address_and_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "lbscaler-backend-1")
    monkeypatch.setattr(socket, "gethostbyname", {"lbscaler-backend-1": "198.18.0.2"}.__getitem__)
    answer = get("/?limit=10")
    assert answer.text == "lbscaler-backend-1 at 198.18.0.2: 4 primes up to 10, for 203.0.113.9\n"


def test_answer_of_a_backend_whose_name_has_no_address_says_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_name: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert " at no address: " in get("/").text


def test_image_has_every_program_file() -> None:
    files = {path.name for path in FOLDER.glob("*.py")} | {"script.sh"}
    copied = re.findall(r"^COPY (.+) /server/$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    let_in = re.findall(r"^!(.+)$", (FOLDER / ".dockerignore").read_text(), re.MULTILINE)
    assert (set(copied[0].split()), set(let_in)) == (files, files)


# -- the answers of /sync ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workload(answers: list[bytes], delay: float = 0.0, kept: bool = True) -> Iterator[int]:
    """The port of a workload. It sends the next of `answers` to each request after `delay` seconds.

    It closes each connection after one answer unless `kept`.
    """
    left = iter(answers)

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError, StopIteration):
            while True:
                connection, _ = listener.accept()
                with connection:
                    while connection.recv(4096):
                        time.sleep(delay)
                        connection.sendall(next(left))
                        if not kept:
                            break

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def checker(port: int) -> Iterator[Workload]:
    made = Workload(port)
    try:
        yield made
    finally:
        made._client.close()


def http(status: int) -> bytes:
    return f"HTTP/1.1 {status} Some reason\r\nContent-Length: 2\r\n\r\nok".encode()


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (http(200), 200, "ready\n"),
        (http(503), 503, "saturated\n"),
        (http(404), 502, "the workload answers no HTTP\n"),
        (b"220 mail\r\n", 502, "the workload answers no HTTP\n"),
    ],
)
def test_sync_reports_the_readiness_of_the_workload(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int, text: str
) -> None:
    with workload([answer]) as port, checker(port) as check:
        monkeypatch.setattr(synchronization_server, "workload", check)
        sync = synchronization_server.app.test_client().get("/sync")
    assert (sync.status_code, sync.text) == (status, text)


def test_sync_reports_starting_while_nothing_listens_on_the_workloads_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synchronization_server, "workload", Workload(free_port()))
    sync = synchronization_server.app.test_client().get("/sync")
    assert (sync.status_code, sync.text) == (503, "starting\n")


def test_sync_reports_draining_even_if_the_workload_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    draining = Event()
    draining.set()
    monkeypatch.setattr(synchronization_server, "draining", draining)
    with workload([http(200)]) as port, checker(port) as check:
        monkeypatch.setattr(synchronization_server, "workload", check)
        sync = synchronization_server.app.test_client().get("/sync")
    assert (sync.status_code, sync.text) == (503, "draining\n")


def test_late_check_is_reported_as_no_answer_and_the_next_call_gets_its_result() -> None:
    with workload([http(200)], delay=synchronization_server.TIMEOUT + 0.4) as port, checker(port) as check:
        assert [check.readiness(), check.readiness()] == [Readiness.NO_ANSWER, Readiness.READY]


def test_kept_connection_that_the_workload_closed_is_replaced_by_a_new_one() -> None:
    with workload([http(200)] * 3, kept=False) as port, checker(port) as check:
        results = []
        for _ in range(3):
            results.append(check.readiness())
            gevent.sleep(0.05)
        assert results == [Readiness.READY] * 3


# -- the whole process -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return True
    except OSError:
        return False


class Program:
    """One of the two programs in its own process and on its own port. It listens when the constructor returns."""

    def __init__(self, code: str, module: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        code = f"import limited_server, {module}; {module}.PORT = {self.port}; {code}; {module}.main()"
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.PIPE, text=True)
        self.log: str | None = None
        until(lambda: accepts(self.port) or self.process.poll() is not None)

    def get(self, path: str = "/", timeout: float = 10) -> requests.Response:
        return requests.get(self.url + path, timeout=timeout)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def end(self) -> str:
        """Kills it if it still runs. Returns what it wrote to standard error."""
        if self.log is None:
            self.process.kill()
            self.log = self.process.communicate()[1]
        return self.log


@contextlib.contextmanager
def backend(code: str = "pass") -> Iterator[Program]:
    """server.py. `code` changes its settings."""
    program = Program(code, "server")
    try:
        yield program
    finally:
        program.end()


@contextlib.contextmanager
def sync_server(workload_port: int) -> Iterator[Program]:
    module = "synchronization_server"
    program = Program(f"{module}.workload = {module}.Workload({workload_port})", module)
    try:
        yield program
    finally:
        program.end()


@contextlib.contextmanager
def many(count: int, program: Program, request: bytes = b"") -> Iterator[list[socket.socket]]:
    """That many connections, on each of which `request` was sent."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            connections.append(stack.enter_context(program.connect()))
            connections[-1].sendall(request)
        yield connections


def has_data(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def everything(connection: socket.socket) -> bytes:
    """All data until the other side closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            data += more
    return data


def test_request_in_progress_at_sigterm_is_finished_after_the_listener_is_closed() -> None:
    with backend("server.LINGER = 0.1") as program:
        with requests.get(f"{program.url}/?seconds=1", stream=True, timeout=10) as answer:
            body = answer.iter_content(None)
            first = next(body)
            program.process.send_signal(signal.SIGTERM)
            program.process.send_signal(signal.SIGTERM)  # the second changes nothing
            time.sleep(0.3)
            with pytest.raises(ConnectionRefusedError):
                program.connect()
            text = (first + b"".join(body)).decode()
        assert re.fullmatch(r"\.{10}\n\S+ at .+: 303 primes up to 2000, for 127.0.0.1\n", text)
        assert program.process.wait(5) == 0


def test_during_linger_new_and_kept_connections_are_answered_and_closed() -> None:
    with backend("server.LINGER = 2.0") as program, requests.Session() as kept:
        url = f"{program.url}/?limit=10"
        assert kept.get(url, timeout=5).headers.get("Connection", "keep-alive") == "keep-alive"
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        for answer in (kept.get(url, timeout=5), requests.get(url, timeout=5)):
            assert (answer.status_code, answer.headers.get("Connection")) == (200, "close")


def test_incomplete_request_delays_the_end_of_a_stopping_backend_only_for_a_limited_time() -> None:
    with backend("server.LINGER = 0.1; server.FINISH = 0.5") as program, many(1, program, b"GET / HT"):
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(5) == 0


def test_sync_reports_draining_after_sigterm() -> None:
    with backend() as program, sync_server(program.port) as sync:
        assert (sync.get("/sync").status_code, sync.get("/sync").text) == (200, "ready\n")
        sync.process.send_signal(signal.SIGTERM)
        until(lambda: sync.get("/sync").text == "draining\n", seconds=2)
        assert sync.get("/sync").status_code == 503


@pytest.mark.slow
def test_backend_with_five_thousand_idle_connections_is_ready_and_answers() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 6000:
        pytest.skip(f"needs 6000 open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        # The process starts with a common limit of open files and has to raise it.
        low = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {hard}))"
        with backend(low) as program, sync_server(program.port) as sync, many(5000, program, REQUEST) as idle:
            idle[-1].settimeout(60)
            assert idle[-1].recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
            assert program.get("/?limit=10").status_code == 200
            until(lambda: sync.get("/sync").text == "ready\n")
            assert resident_memory(program) < 200e6  # bytes; a backend's container has 256 MiB
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_memory(program: Program) -> float:
    """Bytes."""
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def test_saturated_with_requests_it_refuses_without_delay_and_is_ready_again_afterwards() -> None:
    with (
        backend("server.MAX_REQUESTS = 10") as program,
        sync_server(program.port) as sync,
        many(10, program, b"GET /?seconds=2 HTTP/1.1\r\nHost: backend\r\n\r\n") as slow,
    ):
        until(lambda: sync.get("/sync").text == "saturated\n", seconds=2)
        began = time.monotonic()
        refused = program.get("/?limit=10")
        assert time.monotonic() - began < 0.5
        assert (refused.status_code, refused.headers["Retry-After"], refused.headers["Connection"]) == (
            503,
            "1",
            "close",
        )
        assert sync.get("/sync").status_code == 503
        assert all(connection.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n") for connection in slow)
        until(lambda: sync.get("/sync").text == "ready\n")
        assert program.get("/?limit=10").status_code == 200


def test_saturated_backend_is_ready_again_only_well_below_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_REQUESTS", 10)
    tested = server.Backend(max_connections=100)
    states = []
    for requests_now, connections in [(9, 0), (10, 0), (8, 0), (7, 0), (9, 0), (0, 99), (0, 100), (0, 80), (0, 79)]:
        tested.in_progress, tested.server.connections = requests_now, connections
        states.append(tested.is_saturated())
    assert states == [False, True, True, False, False, False, True, True, False]


def test_connection_above_the_limit_is_refused_and_the_backend_is_ready_again_afterwards() -> None:
    with backend("server.MAX_CONNECTIONS = 10") as program, sync_server(program.port) as sync:
        assert sync.get("/sync").text == "ready\n"
        with many(9, program) as idle:
            until(
                lambda: sync.get("/sync").text == "saturated\n", seconds=2
            )  # the connection of its readiness check is the tenth
            refused = program.get("/?limit=10")
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            idle[0].sendall(REQUEST)  # earlier connections are served
            assert idle[0].recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        until(lambda: sync.get("/sync").text == "ready\n", seconds=3)
        assert program.get("/?limit=10").status_code == 200


def test_silent_connection_above_the_limit_is_closed_after_a_second() -> None:
    with backend("server.MAX_CONNECTIONS = 5") as program, many(7, program) as connections:
        assert everything(connections[-1]) == b""  # waits for ten seconds at most
        assert not has_data(connections[0])


def test_connections_far_above_the_limit_are_closed_and_open_files_do_not_run_out() -> None:
    changed = "server.MAX_CONNECTIONS = 10; limited_server.RESERVE = 5; limited_server.REFUSED_IDLE_TIMEOUT = 60"
    with backend(changed) as program, many(25, program) as connections:
        until(lambda: sum(map(has_data, connections)) >= 10)  # select reports a closed connection as readable
        time.sleep(0.2)
        closed = [connection for connection in connections if has_data(connection)]
        assert {everything(connection) for connection in closed} == {b""}
        assert len(closed) in (10, 11)  # the connection that `accepts` made may still be counted


@pytest.mark.slow
def test_busy_backend_answers_readiness_checks_in_time() -> None:
    request = b"GET /?limit=1000000 HTTP/1.1\r\nHost: backend\r\n\r\n"
    with backend() as program, sync_server(program.port) as sync, many(200, program, request) as clients:
        checks = []
        while not all(map(has_data, clients)):
            checks.append(sync.get("/sync").text)
            time.sleep(0.02)
        assert len(checks) > 5  # it was busy for some time
        assert checks.count("ready\n") > 0.8 * len(checks)  # all, unless other programs use the processors


def test_clients_that_retry_immediately_after_a_refusal_do_not_use_up_the_time_of_the_others() -> None:
    """400 clients send requests in a loop. At most 100 requests are in progress, and the others are refused."""
    answers: Counter[bytes] = Counter()
    deadline = time.monotonic() + 60  # the ratio counts, not the speed: other programs may use most of the machine

    def client(port: int) -> None:
        while answers[b"200"] < 200 and time.monotonic() < deadline:
            with gevent.socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /?limit=100000 HTTP/1.1\r\nConnection: close\r\n\r\n")
                answers[connection.recv(4096)[9:12]] += 1

    with backend("server.MAX_REQUESTS = 100") as program:
        gevent.joinall([gevent.spawn(client, program.port) for _ in range(400)], timeout=90, raise_error=True)
    assert answers[b"503"] > 0
    assert answers[b"200"] > 0.3 * answers[b"503"]  # about 1.5 in general, 0.08 if refusals come first


def test_sync_reports_a_frozen_workload_within_the_timeout_of_the_balancers_probe() -> None:
    with backend() as program, sync_server(program.port) as sync:
        assert sync.get("/sync").status_code == 200
        program.process.send_signal(signal.SIGSTOP)
        for _ in range(2):
            began = time.monotonic()
            answer = sync.get("/sync")
            assert (answer.status_code, answer.text) == (504, "the workload does not answer\n")
            assert 0.7 < time.monotonic() - began < 1.0
        program.process.send_signal(signal.SIGCONT)
        until(lambda: sync.get("/sync").status_code == 200)


@pytest.mark.parametrize(
    ("begun", "answer"),
    [
        (b"", b""),
        (b"GET / HT", b"HTTP/1.1 408 Request Timeout\r\n"),
        (b"GET / HTTP/1.1\r\nHost: backend\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
    ],
)
def test_client_that_sends_nothing_or_too_slowly_is_disconnected(begun: bytes, answer: bytes) -> None:
    changed = "limited_server.REQUEST_TIMEOUT = 0.6; server.IDLE_TIMEOUT = 0.6"
    with backend(changed) as program, program.connect() as slow:
        slow.sendall(begun)
        for _ in range(3):  # single bytes do not extend the deadline
            time.sleep(0.15)
            slow.sendall(b"1" if begun else b"")
        began = time.monotonic()
        received = everything(slow)
        assert time.monotonic() - began < 3
        assert received[: received.find(b"\n") + 1] == answer


def test_client_that_does_not_read_its_answers_is_disconnected() -> None:
    with backend("server.LINGER = 0; server.MAX_REQUESTS = 1; limited_server.SEND_TIMEOUT = 0.5") as program:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", program.port))
            client.sendall(REQUEST * 1000)
            time.sleep(1.5)
            assert program.get("/?limit=10").status_code == 200
        program.process.send_signal(signal.SIGTERM)
        program.process.wait(10)
        assert program.end() == ""


def test_long_answer_is_not_cut_by_the_deadlines_of_requests() -> None:
    with backend("limited_server.REQUEST_TIMEOUT = 0.5; server.IDLE_TIMEOUT = 0.5") as program:
        answer = program.get("/?seconds=1.5")
        assert answer.text.startswith("." * 15 + "\n")
        assert "primes" in answer.text


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # the beginning of TLS
        b"GET / HTTP/x.y\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\n: no name\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%s%d\xff HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab",  # the connection ends before the body does
        b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:60]),
)
def test_malformed_request_is_answered_and_not_logged(sent: bytes) -> None:
    with backend("server.LINGER = 0") as program:
        with program.connect() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            answer = everything(client)
        assert re.match(rb"HTTP/1\.1 (200|400|404|414) ", answer)
        assert program.get("/?limit=10").status_code == 200
        program.process.send_signal(signal.SIGTERM)
        program.process.wait(10)
        assert program.end() == ""


def test_answer_to_head_has_no_body() -> None:
    head = "HEAD {} HTTP/1.1\r\nHost: backend\r\n\r\n"
    with backend() as program, program.connect() as client:
        for path in ("/", "/other", "/ready"):
            client.sendall(head.format(path).encode())
        client.sendall(b"GET /ready HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n")
        answers = everything(client).split(b"\r\n\r\n")
    assert [answer[:9] for answer in answers] == [*[b"HTTP/1.1 "] * 4, b"ready\n"]


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nHo"])
def test_client_that_resets_its_connection_instead_of_reading_a_refusal_is_not_logged(sent: bytes) -> None:
    with backend() as program:
        for _ in range(50):
            with program.connect() as client:
                client.sendall(sent)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        assert program.get("/?limit=10").status_code == 200
        assert program.end() == ""


@pytest.mark.parametrize(("begun", "repeated"), WITHOUT_PAUSE)
def test_client_that_sends_without_pause_does_not_delay_others(begun: bytes, repeated: bytes) -> None:
    with backend() as program, without_pause(program.port, begun, repeated):
        for _ in range(3):
            assert program.get("/?limit=10", timeout=3).status_code == 200


def test_headers_have_a_limit_so_that_clients_cannot_use_up_the_memory() -> None:
    with backend() as program, program.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * limited_server.HEADERS_MAX)  # more would follow
        assert everything(client).startswith(b"HTTP/1.1 400 ")
        assert program.get("/?limit=10").status_code == 200


def test_body_is_read_and_the_connection_is_kept() -> None:
    with backend() as program, requests.Session() as kept:
        assert kept.post(program.url, data=b"x" * 1_000_000, timeout=10).status_code == 405
        assert kept.get(f"{program.url}/?limit=10", data=iter([b"a chunk", b"another"]), timeout=10).status_code == 200
        assert "Connection" not in kept.get(f"{program.url}/?limit=10", timeout=10).headers


def test_answers_on_one_connection_do_not_wait_for_delayed_acknowledgements() -> None:
    with backend() as program, requests.Session() as kept:
        durations = []
        for _ in range(40):
            began = time.monotonic()
            kept.get(program.url, timeout=5)
            durations.append(time.monotonic() - began)
        # The kernel begins to delay acknowledgements, by 0.04 s each, after some packets.
        assert min(durations[-10:]) < 0.03
