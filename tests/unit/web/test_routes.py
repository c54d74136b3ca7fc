"""The manager's HTTP interface over a fake engine: who may what, what is refused, what is answered, and no 500."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import Client, TestResponse

from core.controller import Controller
from fakes import TOKEN, Clock, FakeEngine, controller
from web.app import BODY_MAX, TAIL, as_operator, create_app

BEARER = {"Authorization": f"Bearer {TOKEN}"}
SCRIPTS = ["/page.js", "/charts.js", "/plotly.js"]
PARTS = {"/": "html", "/page.css": "css", **dict.fromkeys(SCRIPTS, "javascript")}
READS = [*PARTS, "/status", "/decisions", "/history", "/log", "/metrics", "/sync"]
OPERATORS = {"/scale": {"min": 3}, "/pause": {}, "/resume": {}, "/drain": {"ip": "198.18.0.2"}}
BALANCERS = {"/pkts_info": 200, "/stop": 204}
ROW = {
    **{"id": "100000000000", "ip": "198.18.0.2", "healthy": True, "share": 0.25},
    **{"connections": 4, "packets": 40, "bytes": 400, "active": 2},
}
REPORT: dict[str, Any] = {"balancer": "b1", "revision": "r", "interval": 2, "backends": [ROW], "warnings": []}


class Doors:
    """The manager's doors, two backends behind them: `tcp` for all the world, `unix` for the operator."""

    def __init__(self, place: Path) -> None:
        self.clock = Clock()
        self.engine = FakeEngine("p-backend-1", "p-backend-2")
        self.controller: Controller = controller(self.engine, place, self.clock)
        self.controller.adopt(None)
        self.app: Flask = create_app(self.controller, TOKEN, ["198.18.0.1"])
        self.from_tcp = Client(self.app, self.app.response_class)
        self.from_socket = Client(as_operator(self.app), self.app.response_class)

    def tcp(self, method: str, path: str, body: Any = None, remote: str = "127.0.0.1", **more: Any) -> TestResponse:
        more = {"headers": BEARER, **({"json": body} if body is not None else {}), **more}
        return self.from_tcp.open(path, method=method, environ_base={"REMOTE_ADDR": remote}, **more)

    def unix(self, method: str, path: str, body: Any = None) -> TestResponse:
        return self.from_socket.open(path, method=method, json=body)

    def report_twice(self) -> dict[str, Any]:
        """What the second of two reports, of 150 packets/s over two backends, is answered."""
        self.tcp("POST", "/pkts_info", REPORT)
        self.clock.pass_by(2)
        row = {**ROW, "connections": 8, "packets": 340}
        answer = self.tcp("POST", "/pkts_info", {**REPORT, "backends": [row]})
        assert answer.status_code == 200
        return answer.get_json()


@pytest.fixture
def doors(tmp_path: Path) -> Doors:
    return Doors(tmp_path)


def refused(answer: TestResponse, status: int, line: str) -> None:
    """It is that status, and plain text in one line."""
    assert (answer.status_code, answer.text) == (status, f"{line}\n")
    assert answer.mimetype == "text/plain"


# -- who may what -----------------------------------------------------------------------------------------------------

NO_TOKEN = "this call needs the token: Authorization: Bearer <run/PROJECT/token>"
NOT_OURS = "this Host is not one of the manager's"
SOCKET_ONLY = "the operator's calls go through run/PROJECT/manager.sock only"


@pytest.mark.parametrize("path", READS)
def test_reads_are_free_on_loopback_and_need_the_token_from_elsewhere(doors: Doors, path: str) -> None:
    assert doors.tcp("GET", path, headers={}).status_code == 200
    assert doors.tcp("HEAD", path, headers={}).status_code == 200
    assert doors.tcp("GET", path, remote="198.18.0.9").status_code == 200
    refused(doors.tcp("GET", path, headers={}, remote="198.18.0.9"), 401, NO_TOKEN)
    refused(doors.tcp("GET", path, headers={}, remote="::1"), 401, NO_TOKEN)


@pytest.mark.parametrize(
    "header", ["", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer é"]
)
def test_what_changes_anything_needs_the_very_token_even_on_loopback(doors: Doors, header: str) -> None:
    before = doors.controller.status()
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        for path in (*BALANCERS, *OPERATORS, "/nowhere"):
            refused(doors.tcp(method, path, {}, headers={"Authorization": header}), 401, NO_TOKEN)
    assert doors.controller.status() == before


def test_a_balancer_with_the_token_may_report_and_stop(doors: Doors) -> None:
    assert doors.tcp("POST", "/pkts_info", REPORT, remote="198.18.0.9").status_code == 200
    stop = {"ip": "198.18.0.2", "reason": "drained"}
    assert doors.tcp("POST", "/stop", stop, remote="198.18.0.9").status_code == 204
    assert doors.controller.status()["backends"][0]["state"] == "draining"


@pytest.mark.parametrize(("path", "body"), OPERATORS.items())
def test_the_operators_calls_are_refused_on_tcp_and_taken_from_the_socket(doors: Doors, path: str, body: Any) -> None:
    before = doors.controller.status()
    refused(doors.tcp("POST", path, body), 403, SOCKET_ONLY)
    forged = {"lbscaler.operator": "1", "Lbscaler-Operator": "1"}
    refused(doors.tcp("POST", path, body, headers=forged), 401, NO_TOKEN)
    refused(doors.tcp("POST", path, body, headers={**BEARER, **forged}), 403, SOCKET_ONLY)
    assert doors.controller.status() == before
    assert doors.unix("POST", path, body).status_code in (200, 204)


def test_the_operator_needs_no_token_for_anything(doors: Doors) -> None:
    for path in READS:
        assert doors.unix("GET", path).status_code == 200
    assert doors.unix("POST", "/pkts_info", REPORT).status_code == 200
    assert doors.unix("POST", "/stop", {"ip": "198.18.0.2", "reason": "ill"}).status_code == 204


@pytest.mark.parametrize("host", ["127.0.0.1:5000", "127.0.0.1", "localhost:5000", "localhost", "198.18.0.1:5000"])
def test_the_managers_own_names_are_served(doors: Doors, host: str) -> None:
    assert doors.tcp("GET", "/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5000", "127.0.0.1.evil.example", "x127.0.0.1:80", "198.18.0.2:5000", "[::1]:80"],
)
def test_another_host_is_refused_even_with_the_token(doors: Doors, host: str) -> None:
    refused(doors.tcp("GET", "/status", headers={"Host": host, **BEARER}), 403, NOT_OURS)


# -- what is refused --------------------------------------------------------------------------------------------------

OBJECT = "the body has to be a JSON object"
PRINTABLE = "has to be a text of 1 to 300 printable characters"
COUNT = f"has to be a whole number from 0 to {2**64}"
LIST = "backends has to be a list of at most 10000 objects"
LIMITS = "/scale takes min, max (1 to 1000) and target (above 0)"
TARGET = "target has to be a number from 0.001 to 1e+09"
WARNINGS = "warnings has to be a list of at most 10 texts"
MINIMUM = "min has to be a whole number from 1 to 1000"


def reported(**row: Any) -> dict[str, Any]:
    return {**REPORT, "backends": [{**ROW, **row}]}


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        *((path, body, OBJECT) for path in ("/pkts_info", "/stop", "/drain", "/scale") for body in ([], 3, "x", True)),
        ("/pkts_info", {}, LIST),
        ("/pkts_info", {**REPORT, "backends": {}}, LIST),
        ("/pkts_info", {**REPORT, "backends": [3]}, LIST),
        ("/pkts_info", {**REPORT, "backends": [{}] * 10_001}, LIST),
        ("/pkts_info", {**REPORT, "interval": 0}, "interval has to be a number from 0.1 to 3600"),
        ("/pkts_info", {**REPORT, "interval": None}, "interval has to be a number from 0.1 to 3600"),
        ("/pkts_info", {**REPORT, "interval": True}, "interval has to be a number from 0.1 to 3600"),
        ("/pkts_info", {**REPORT, "balancer": ""}, f"balancer {PRINTABLE}"),
        ("/pkts_info", {**REPORT, "balancer": "a\nb"}, f"balancer {PRINTABLE}"),
        ("/pkts_info", {**REPORT, "balancer": "x" * 301}, f"balancer {PRINTABLE}"),
        ("/pkts_info", {**REPORT, "revision": 3}, f"revision {PRINTABLE}"),
        ("/pkts_info", {**REPORT, "warnings": "full"}, WARNINGS),
        ("/pkts_info", {**REPORT, "warnings": ["full"] * 11}, WARNINGS),
        ("/pkts_info", {**REPORT, "warnings": ["a\nb"]}, f"warning {PRINTABLE}"),
        ("/pkts_info", reported(id=""), f"id {PRINTABLE}"),
        ("/pkts_info", reported(share=1.1), "share has to be a number from 0 to 1"),
        ("/pkts_info", reported(share=None), "share has to be a number from 0 to 1"),
        ("/pkts_info", reported(ip=None), f"ip {PRINTABLE}"),
        ("/pkts_info", reported(healthy="yes"), "healthy has to be true, false or null"),
        ("/pkts_info", reported(healthy=[]), "healthy has to be true, false or null"),
        ("/pkts_info", reported(packets=-1), f"packets {COUNT}"),
        ("/pkts_info", reported(packets=2**64 + 1), f"packets {COUNT}"),
        ("/pkts_info", reported(bytes=1.5), f"bytes {COUNT}"),
        ("/pkts_info", reported(active=True), f"active {COUNT}"),
        ("/pkts_info", reported(connections="4"), f"connections {COUNT}"),
        ("/stop", {"reason": "ill"}, f"ip {PRINTABLE}"),
        ("/stop", {"ip": "198.18.0.2"}, f"reason {PRINTABLE}"),
        ("/stop", {"ip": "198.18.0.2", "reason": "a\x1b[2J"}, f"reason {PRINTABLE}"),
        ("/stop", {"ip": "198.18.0.2", "reason": "ill", "balancer": ""}, f"balancer {PRINTABLE}"),
        ("/stop", {"ip": "198.18.0.2", "reason": "ill", "balancer": None}, f"balancer {PRINTABLE}"),
        ("/drain", {"ip": 3}, f"ip {PRINTABLE}"),
        ("/scale", {}, LIMITS),
        ("/scale", {"max": 3, "minimum": 2}, LIMITS),
        ("/scale", {"min": 0}, MINIMUM),
        ("/scale", {"min": None}, MINIMUM),
        ("/scale", {"min": 2.0}, MINIMUM),
        ("/scale", {"max": 1001}, "max has to be a whole number from 1 to 1000"),
        ("/scale", {"target": 0}, TARGET),
        ("/scale", {"target": float("nan")}, TARGET),
        ("/scale", {"target": 10**400}, TARGET),
        ("/scale", {"target": [1]}, TARGET),
        ("/scale", {"min": 11}, "min 11 would be above max 10"),
    ],
)
def test_a_bad_body_is_one_line_of_400_and_changes_nothing(doors: Doors, path: str, body: Any, line: str) -> None:
    before = doors.controller.status()
    refused(doors.unix("POST", path, body), 400, line)
    assert doors.controller.status() == before


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"min": 3} 4', b"9" * 5000, b"[" * 100_000])
def test_a_body_that_is_no_json_is_one_line_of_400(doors: Doors, data: bytes) -> None:
    for path in ("/pkts_info", "/stop"):
        refused(doors.tcp("POST", path, data=data), 400, OBJECT)


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "x", ""])
def test_a_wait_out_of_bounds_is_one_line_of_400(doors: Doors, wait: str) -> None:
    refused(doors.tcp("GET", f"/sync?wait={wait}"), 400, "wait has to be a number from 0 to 60")


def test_an_address_that_is_not_a_backend_of_ours_is_404(doors: Doors) -> None:
    line = "no backend of ours has the address 198.18.0.99"
    refused(doors.tcp("POST", "/stop", {"ip": "198.18.0.99", "reason": "ill"}), 404, line)
    refused(doors.unix("POST", "/drain", {"ip": "198.18.0.99"}), 404, line)


@pytest.mark.parametrize(
    ("method", "path", "size", "status", "line"),
    [
        ("GET", "/nowhere", 0, 404, "Not Found"),
        ("GET", "/%3Cscript%3Ealert(1)%3C/script%3E%0A", 0, 404, "Not Found"),
        ("GET", "/stop", 0, 405, "Method Not Allowed"),
        ("POST", "/stop", BODY_MAX + 1, 413, "Request Entity Too Large"),
    ],
)
def test_what_there_is_not_is_one_line_that_repeats_nothing_of_the_request(
    doors: Doors, method: str, path: str, size: int, status: int, line: str
) -> None:
    refused(doors.tcp(method, path, data=b" " * size), status, line)


# -- what is answered -------------------------------------------------------------------------------------------------


def test_a_report_is_answered_with_the_decision(doors: Doors) -> None:
    answer = doors.tcp("POST", "/pkts_info", REPORT).get_json()
    assert answer == {"decision": "OK", "desired": 2, "reason": "no rate before the second report"}
    reason = "150 packets/s over 2 backends = 75 each, target 100 (0.75×)"
    assert doors.report_twice() == {"decision": "OK", "desired": 2, "reason": reason}


def test_a_long_poll_answers_at_once_when_the_revision_differs_else_204_after_the_wait(doors: Doors) -> None:
    view = doors.tcp("GET", "/sync?wait=50").get_json()
    assert view.keys() == {"revision", "service", "backends"}
    assert [(b["ip"], b["state"], b["weight"]) for b in view["backends"]] == [
        ("198.18.0.2", "active", 1),
        ("198.18.0.3", "active", 1),
    ]
    begun = time.monotonic()
    answer = doors.tcp("GET", f"/sync?have={view['revision']}&wait=0.1")
    assert (answer.status_code, answer.data) == (204, b"")
    assert 0.1 <= time.monotonic() - begun < 1

    drain = threading.Timer(0.05, doors.controller.drain, ["198.18.0.2"])
    drain.start()
    answer = doors.tcp("GET", f"/sync?have={view['revision']}&wait=5")
    assert answer.get_json()["backends"][0]["state"] == "draining"
    drain.join()


def test_the_status_has_the_shape_of_the_contract(doors: Doors) -> None:
    doors.report_twice()
    status = doors.tcp("GET", "/status").get_json()
    assert status.keys() >= {
        *("project", "desired", "current", "metric", "rate", "target", "paused", "revision"),
        *("backends", "balancers", "last_decision"),
    }
    assert (status["project"], status["desired"], status["current"], status["metric"]) == ("p", 2, 2, "packets")
    assert (status["rate"], status["target"], status["paused"]) == (150, 100, False)
    assert status["balancers"] == [{"id": "b1", "last_seen": 0, "revision": "r"}]
    first, second = status["backends"]
    assert first.keys() >= {
        *("name", "ip", "state", "weight", "share", "connections", "packets", "bytes", "active", "healthy"),
    }
    assert [first[k] for k in ("name", "ip", "state", "weight")] == ["p-backend-1", "198.18.0.2", "active", 1]
    assert [first[k] for k in ("share", "connections", "packets", "bytes", "active")] == [0.25, 8, 340, 400, 2]
    assert (first["healthy"], second["healthy"], second["packets"]) == (True, None, 0)
    assert status["last_decision"]["verdict"] == "OK"
    counts = {"failed": 0, "retry_in": 0, "replaced": 2, "to_replace": 0}
    assert status["launches"] == {**counts, "why": "", "updating": False, "update_given_up": ""}
    assert status["balancer"] == {"state": "running", "problem": ""}
    assert status["data_path"] == {"working": None, "problem": "", "findings": []}
    assert status["rotation_panic"] == []


def test_before_the_first_report_the_status_has_no_numbers_rather_than_zeros(doors: Doors) -> None:
    status = doors.tcp("GET", "/status").get_json()
    assert (status["rate"], status["last_decision"], status["balancers"]) == (None, None, [])


def test_a_balancer_that_names_itself_speaks_for_itself_alone(doors: Doors) -> None:
    for name in ("b1", "b2"):
        doors.tcp("POST", "/pkts_info", {**REPORT, "balancer": name})
    doors.unix("POST", "/drain", {"ip": "198.18.0.2"})
    for name, state in (("b1", "draining"), ("b2", "stopped")):
        said = {"ip": "198.18.0.2", "reason": "drained", "balancer": name}
        assert doors.tcp("POST", "/stop", said).status_code == 204
        assert doors.controller.status()["backends"][0]["state"] == state


def test_the_decisions_are_told_with_every_number_that_led_to_them(doors: Doors) -> None:
    assert doors.tcp("GET", "/decisions").get_json() == []
    doors.report_twice()
    (decision,) = doors.tcp("GET", "/decisions").get_json()
    assert abs(decision.pop("time") - time.time()) < 60, "in seconds since 1970"
    assert decision == {
        **{"at": 1002, "verdict": "OK", "current": 2, "desired": 2, "rate": 150, "ratio": 0.75, "raw": 2},
        **{"clamps": [], "reason": "150 packets/s over 2 backends = 75 each, target 100 (0.75×)"},
    }


def test_the_metrics_are_what_prometheus_reads(doors: Doors) -> None:
    doors.report_twice()
    doors.unix("POST", "/drain", {"ip": "198.18.0.3"})
    answer = doors.tcp("GET", "/metrics")
    assert answer.mimetype == "text/plain"
    samples = {
        (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(answer.text) for s in f.samples
    }
    assert samples["lbscaler_backend_connections_total", "p-backend-1"] == 8
    assert samples["lbscaler_backend_packets_total", "p-backend-1"] == 340
    assert samples["lbscaler_backend_bytes_total", "p-backend-1"] == 400
    assert samples["lbscaler_backend_packets_total", "p-backend-2"] == 0
    states = {key[1]: value for key, value in samples.items() if key[0] == "lbscaler_backends"}
    assert states == {"spare": 0, "starting": 0, "active": 1, "draining": 1, "stopped": 0, "failed": 0}
    assert samples[("lbscaler_desired_backends",)] == 2


@pytest.mark.parametrize(("path", "kind"), PARTS.items())
def test_the_page_is_all_from_here_and_may_ask_nobody_else(doors: Doors, path: str, kind: str) -> None:
    answer = doors.tcp("GET", path)
    assert (answer.status_code, answer.mimetype) == (200, f"text/{kind}")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    again = doors.tcp("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_the_big_script_is_not_asked_for_every_time_and_the_page_always_is(doors: Doors) -> None:
    ages = {path: doors.tcp("HEAD", path).cache_control.max_age for path in PARTS}
    assert ages == {**dict.fromkeys(PARTS, 0), "/plotly.js": 86400}


def test_a_file_that_is_no_part_of_the_page_is_not_served(doors: Doors) -> None:
    for path in ("/index.html", "/script.py", "/page/page.js", "/..%2fscript.py", "/page.js%2f..%2f..%2fscript.py"):
        refused(doors.tcp("GET", path), 404, "Not Found")


def test_the_history_tells_what_is_newer_in_the_shape_of_the_contract(doors: Doors) -> None:
    assert doors.tcp("GET", "/history").get_json() == {"points": [], "decisions": []}
    doors.report_twice()
    doors.clock.pass_by(2)
    row = {**ROW, "connections": 99, "packets": 1540}
    doors.tcp("POST", "/pkts_info", {**REPORT, "backends": [row]})
    past = doors.tcp("GET", "/history").get_json()
    first, second = past["points"]
    (decision,) = past["decisions"]
    assert abs(second["time"] - time.time()) < 60, "in seconds since 1970"
    assert decision["time"] == second["time"] == pytest.approx(first["time"] + 2)
    assert first == {"time": first["time"], "rate": 150, "capacity": 200, "backends": 2, "desired": 2}
    assert second == {"time": second["time"], "rate": 375, "capacity": 200, "backends": 2, "desired": 4}
    reason = "375 packets/s over 2 backends = 187.5 each, target 100 (1.88×)"
    numbers = {"verdict": "CREATE_SERVER", "current": 2, "desired": 4, "reason": reason}
    assert decision == {"time": decision["time"], **numbers}
    later = doors.tcp("GET", f"/history?since={first['time']}").get_json()
    assert later == {"points": [second], "decisions": [decision]}
    refused(doors.tcp("GET", "/history?since=x"), 400, "since has to be a number from 0 to 1e+12")


def test_the_log_is_told_from_its_end(doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    log = tmp_path / "run" / "p" / "manager.log"
    assert (doors.tcp("GET", "/log").status_code, doors.tcp("GET", "/log").text) == (200, "")
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number} <b> →\n" for number in range(700)))
    answer = doors.tcp("GET", "/log?lines=2")
    assert (answer.text, answer.mimetype) == ("line 698 <b> →\nline 699 <b> →\n", "text/plain")
    assert len(doors.tcp("GET", "/log").text.splitlines()) == 100
    refused(doors.tcp("GET", "/log?lines=501"), 400, "lines has to be a number from 1 to 500")
    log.write_text("early\n" + "→" * TAIL + "\nlate\n")
    assert doors.tcp("GET", "/log?lines=500").text == "late\n", "half a line is no line"


def test_the_status_tells_the_settings_in_force_and_no_secret(tmp_path: Path) -> None:
    made = controller(
        FakeEngine(), tmp_path, Clock(), env="PASSWORD=sesame", command="db --password sesame", allow="write,root"
    )
    made.scale(3, None, 7.5)
    app = create_app(made, TOKEN, [])
    status = Client(app, app.response_class).get("/status", environ_base={"REMOTE_ADDR": "127.0.0.1"})
    told = status.get_json()["settings"]
    assert told.keys() == vars(made.settings).keys() - {"env", "command"}
    assert [told[name] for name in ("min", "max", "target", "weights")] == [3, 10, 7.5, "adaptive"]
    assert told["allow"] == ["root", "write"]
    assert "sesame" not in status.text


def test_the_operators_calls_take_effect(doors: Doors) -> None:
    answer = doors.unix("POST", "/scale", {"min": 3, "max": 4, "target": 7.5}).get_json()
    assert answer == {"min": 3, "max": 4, "target": 7.5, "desired": 3}
    assert doors.unix("POST", "/pause").get_json() == {"paused": True}
    assert doors.tcp("GET", "/status").get_json()["paused"] is True
    assert doors.unix("POST", "/resume").get_json() == {"paused": False}
    assert doors.tcp("GET", "/status").get_json()["paused"] is False
    assert doors.unix("POST", "/drain", {"ip": "198.18.0.3"}).status_code == 204
    assert doors.tcp("GET", "/status").get_json()["backends"][1]["state"] == "draining"


# -- anything at all --------------------------------------------------------------------------------------------------

WORDS = ["ip", "reason", "balancer", "min", "max", "target", *REPORT, *ROW]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["198.18.0.2", "b1"])
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(WORDS), v, max_size=4)
)
JSON = VALUES.map(lambda value: json.dumps(value).encode())
PATHS = st.sampled_from([*READS, *BALANCERS, *OPERATORS, "/nowhere", "/static/x"])
METHODS = st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"])
QUERIES = st.dictionaries(st.sampled_from(["have", "wait", "since", "lines"]), st.text(max_size=5), max_size=2)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Authorization": st.sampled_from([BEARER["Authorization"]]) | st.text("Bear é\x7f", max_size=9),
        "Host": st.sampled_from(["localhost", "[::1", "a b", "é", ":"]),
        "Content-Type": st.sampled_from(["application/json", "multipart/form-data; boundary=x", "é"]),
    },
)
fuzzed = hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def served(doors: Doors, answer: TestResponse) -> None:
    """It is no 500, a refusal is one line, and whatever it changed, the page and the metrics can still be told."""
    assert answer.status_code < 500
    assert answer.status_code < 400 or len(answer.text.splitlines()) <= 1
    assert {doors.tcp("GET", path).status_code for path in ("/", "/metrics")} == {200}


@fuzzed
@given(PATHS, METHODS, QUERIES, HEADERS, JSON | st.binary(max_size=50), st.booleans())
def test_whatever_is_sent_anywhere_is_no_500(
    doors: Doors, path: str, method: str, query: dict, headers: dict, body: bytes, operator: bool
) -> None:
    door = doors.from_socket if operator else doors.from_tcp
    served(doors, door.open(path, method=method, query_string=query, headers=headers, data=body))


def nearly(good: dict[str, Any]) -> st.SearchStrategy:
    """Bodies that are good but for a field or two, which are anything or not there."""
    wrong = st.dictionaries(st.sampled_from(list(good)), VALUES | st.just(...), max_size=2)
    return wrong.map(lambda changes: {k: v for k, v in {**good, **changes}.items() if v is not ...})


@fuzzed
@given(st.lists(nearly(ROW), max_size=3), nearly(REPORT), st.floats(0, 100))
def test_whatever_is_reported_is_no_500(doors: Doors, rows: list, body: dict, later: float) -> None:
    doors.clock.pass_by(later)
    body = {**body, "backends": rows} if body.get("backends") == REPORT["backends"] else body
    served(doors, doors.tcp("POST", "/pkts_info", body))


@fuzzed
@given(
    st.sampled_from(["/scale", "/stop", "/drain"]),
    nearly({"min": 1, "max": 9, "target": 1, "ip": "x", "reason": "r", "balancer": "b1"}),
)
def test_whatever_is_ordered_is_no_500(doors: Doors, path: str, body: dict) -> None:
    names = {"/scale": {"min", "max", "target"}}.get(path, {"ip", "reason", "balancer"})
    served(doors, doors.unix("POST", path, {name: value for name, value in body.items() if name in names}))
