"""The manager's HTTP interface over a fake engine: access, refusals, answers, and no status 500 for any request."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import Client, TestResponse

from core import scaler
from core.controller import Controller
from fakes import TOKEN, Clock, FakeEngine, controller
from web.app import as_operator, create_app
from web.http_server import BODY_MAX
from web.recent_log import KEPT, RecentLog

BEARER = {"Authorization": f"Bearer {TOKEN}"}
SCRIPTS = ["/page.js", "/charts.js", "/plotly.js"]
PARTS = {"/": "html", "/page.css": "css", **dict.fromkeys(SCRIPTS, "javascript")}
READS = [*PARTS, "/status", "/decisions", "/history", "/log", "/metrics", "/sync", "/shares", "/what-if"]
OPERATORS = {"/scale": {"min": 3}, "/pause": {}, "/resume": {}, "/drain": {"ip": "198.18.0.2"}}
BALANCERS = {"/pkts_info": 200, "/stop": 204}
ROW = {
    **{"id": "100000000000", "ip": "198.18.0.2", "healthy": True, "share": 0.25},
    **{"connections": 4, "packets": 40, "bytes": 400, "active": 2},
}
REPORT: dict[str, Any] = {"balancer": "b1", "revision": "r", "interval": 2, "backends": [ROW], "warnings": []}


class Manager:
    """A manager with two backends: `tcp` calls it as anybody may, `unix` as the operator."""

    def __init__(self, place: Path) -> None:
        self.clock = Clock()
        self.engine = FakeEngine("p-backend-1", "p-backend-2")
        self.controller: Controller = controller(self.engine, place, self.clock)
        self.controller.adopt(None)
        self.log = RecentLog()
        self.app: Flask = create_app(self.controller, TOKEN, ["198.18.0.1"], recent_log=self.log)
        self.from_tcp = Client(self.app, self.app.response_class)
        self.from_socket = Client(as_operator(self.app), self.app.response_class)

    def tcp(self, method: str, path: str, body: Any = None, remote: str = "127.0.0.1", **more: Any) -> TestResponse:
        more = {"headers": BEARER, **({"json": body} if body is not None else {}), **more}
        return self.from_tcp.open(path, method=method, environ_base={"REMOTE_ADDR": remote}, **more)

    def unix(self, method: str, path: str, body: Any = None) -> TestResponse:
        return self.from_socket.open(path, method=method, json=body)

    def report_twice(self) -> dict[str, Any]:
        """The answer to the second of two reports, of 150 packets/s over two backends."""
        self.tcp("POST", "/pkts_info", REPORT)
        self.clock.pass_by(2)
        row = {**ROW, "connections": 8, "packets": 340}
        answer = self.tcp("POST", "/pkts_info", {**REPORT, "backends": [row]})
        assert answer.status_code == 200
        return answer.get_json()


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    return Manager(tmp_path)


def refused(answer: TestResponse, status: int, line: str) -> None:
    """The answer has that status, and one line of plain text."""
    assert (answer.status_code, answer.text) == (status, f"{line}\n")
    assert answer.mimetype == "text/plain"


# -- access -----------------------------------------------------------------------------------------------------------

NO_TOKEN = "this call needs the token: Authorization: Bearer <run/PROJECT/token>"
FOREIGN_HOST = "the Host header is not an address of this manager"
SOCKET_ONLY = "operator calls are accepted through run/PROJECT/manager.sock only"


@pytest.mark.parametrize("path", READS)
def test_reads_need_the_token_except_from_loopback(manager: Manager, path: str) -> None:
    assert manager.tcp("GET", path, headers={}).status_code == 200
    assert manager.tcp("HEAD", path, headers={}).status_code == 200
    assert manager.tcp("GET", path, remote="198.18.0.9").status_code == 200
    refused(manager.tcp("GET", path, headers={}, remote="198.18.0.9"), 401, NO_TOKEN)
    refused(manager.tcp("GET", path, headers={}, remote="::1"), 401, NO_TOKEN)


@pytest.mark.parametrize(
    "header", ["", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer é"]
)
def test_calls_that_change_something_need_the_exact_token_even_from_loopback(manager: Manager, header: str) -> None:
    before = manager.controller.status()
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        for path in (*BALANCERS, *OPERATORS, "/nowhere"):
            refused(manager.tcp(method, path, {}, headers={"Authorization": header}), 401, NO_TOKEN)
    assert manager.controller.status() == before


def test_a_balancer_with_the_token_may_report_and_stop(manager: Manager) -> None:
    assert manager.tcp("POST", "/pkts_info", REPORT, remote="198.18.0.9").status_code == 200
    stop = {"ip": "198.18.0.2", "reason": "drained"}
    assert manager.tcp("POST", "/stop", stop, remote="198.18.0.9").status_code == 204
    assert manager.controller.status()["backends"][0]["state"] == "draining"


@pytest.mark.parametrize(("path", "body"), OPERATORS.items())
def test_operator_calls_are_refused_on_tcp_and_accepted_on_the_socket(manager: Manager, path: str, body: Any) -> None:
    before = manager.controller.status()
    refused(manager.tcp("POST", path, body), 403, SOCKET_ONLY)
    forged = {"lbscaler.operator": "1", "Lbscaler-Operator": "1"}
    refused(manager.tcp("POST", path, body, headers=forged), 401, NO_TOKEN)
    refused(manager.tcp("POST", path, body, headers={**BEARER, **forged}), 403, SOCKET_ONLY)
    assert manager.controller.status() == before
    assert manager.unix("POST", path, body).status_code in (200, 204)


def test_the_operator_needs_no_token(manager: Manager) -> None:
    for path in READS:
        assert manager.unix("GET", path).status_code == 200
    assert manager.unix("POST", "/pkts_info", REPORT).status_code == 200
    assert manager.unix("POST", "/stop", {"ip": "198.18.0.2", "reason": "drained"}).status_code == 204


@pytest.mark.parametrize("host", ["127.0.0.1:5000", "127.0.0.1", "localhost:5000", "localhost", "198.18.0.1:5000"])
def test_a_host_header_with_an_address_of_the_manager_is_accepted(manager: Manager, host: str) -> None:
    assert manager.tcp("GET", "/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5000", "127.0.0.1.evil.example", "x127.0.0.1:80", "198.18.0.2:5000", "[::1]:80"],
)
def test_another_host_header_is_refused_even_with_the_token(manager: Manager, host: str) -> None:
    refused(manager.tcp("GET", "/status", headers={"Host": host, **BEARER}), 403, FOREIGN_HOST)


# -- refusals --------------------------------------------------------------------------------------------------------

TEXT = "Expected text of 1 to 300 printable characters - at `$.{}`"
ROW_TEXT = "Expected text of 1 to 300 printable characters - at `$.backends[0].{}`"
NO_FIELD = "Object missing required field `{}`"
TOO_MUCH = 2**63
SMALL_ROW = {"ip": "a", "connections": 0, "packets": 0, "bytes": 0, "active": 0}


def reported(**row: Any) -> dict[str, Any]:
    return {**REPORT, "backends": [{**ROW, **row}]}


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        *((path, [], "Expected `object`, got `array`") for path in ("/pkts_info", "/stop", "/drain", "/scale")),
        *((path, 3, "Expected `object`, got `int`") for path in ("/pkts_info", "/stop", "/drain", "/scale")),
        ("/pkts_info", {}, NO_FIELD.format("balancer")),
        ("/pkts_info", {**REPORT, "backends": {}}, "Expected `array`, got `object` - at `$.backends`"),
        ("/pkts_info", {**REPORT, "backends": [3]}, "Expected `object`, got `int` - at `$.backends[0]`"),
        ("/pkts_info", {**REPORT, "backends": [{}]}, f"{NO_FIELD.format('ip')} - at `$.backends[0]`"),
        (
            "/pkts_info",
            {**REPORT, "backends": [SMALL_ROW] * 10_001},
            "Expected `array` of length <= 10000 - at `$.backends`",
        ),
        ("/pkts_info", {**REPORT, "interval": 0}, "Expected `float` >= 0.1 - at `$.interval`"),
        ("/pkts_info", {**REPORT, "interval": None}, "Expected `float`, got `null` - at `$.interval`"),
        ("/pkts_info", {**REPORT, "interval": True}, "Expected `float`, got `bool` - at `$.interval`"),
        ("/pkts_info", {**REPORT, "balancer": ""}, TEXT.format("balancer")),
        ("/pkts_info", {**REPORT, "balancer": "a\nb"}, TEXT.format("balancer")),
        ("/pkts_info", {**REPORT, "balancer": "a\u202eb"}, TEXT.format("balancer")),
        ("/pkts_info", {**REPORT, "balancer": "x" * 301}, TEXT.format("balancer")),
        ("/pkts_info", {**REPORT, "revision": 3}, TEXT.format("revision")),
        ("/pkts_info", {**REPORT, "panic": 1}, "Expected `bool`, got `int` - at `$.panic`"),
        ("/pkts_info", {**REPORT, "uptime": -1}, "Expected `float` >= 0.0 - at `$.uptime`"),
        ("/pkts_info", {**REPORT, "warnings": "full"}, "Expected `array`, got `str` - at `$.warnings`"),
        ("/pkts_info", {**REPORT, "warnings": ["full"] * 11}, "Expected `array` of length <= 10 - at `$.warnings`"),
        ("/pkts_info", {**REPORT, "warnings": ["a\nb"]}, TEXT.format("warnings[0]")),
        ("/pkts_info", {**REPORT, "findings": [{}]}, f"{NO_FIELD.format('kind')} - at `$.findings[0]`"),
        (
            "/pkts_info",
            {**REPORT, "findings": [{"kind": "x"}] * 21},
            "Expected `array` of length <= 20 - at `$.findings`",
        ),
        ("/pkts_info", reported(id=""), ROW_TEXT.format("id")),
        ("/pkts_info", reported(share=1.1), "Expected `float` <= 1.0 - at `$.backends[0].share`"),
        ("/pkts_info", reported(ip=None), ROW_TEXT.format("ip")),
        ("/pkts_info", reported(healthy="yes"), "Expected `bool | null`, got `str` - at `$.backends[0].healthy`"),
        ("/pkts_info", reported(packets=-1), "Expected `int` >= 0 - at `$.backends[0].packets`"),
        ("/pkts_info", reported(packets=TOO_MUCH), f"Expected `int` <= {TOO_MUCH - 1} - at `$.backends[0].packets`"),
        ("/pkts_info", reported(bytes=1.5), "Expected `int`, got `float` - at `$.backends[0].bytes`"),
        ("/pkts_info", reported(active=True), "Expected `int`, got `bool` - at `$.backends[0].active`"),
        ("/pkts_info", reported(connections="4"), "Expected `int`, got `str` - at `$.backends[0].connections`"),
        ("/stop", {"reason": "drained"}, NO_FIELD.format("ip")),
        ("/stop", {"ip": "198.18.0.2"}, NO_FIELD.format("reason")),
        ("/stop", {"ip": "198.18.0.2", "reason": "a\x1b[2J"}, TEXT.format("reason")),
        ("/stop", {"ip": "198.18.0.2", "reason": "drained", "id": ""}, TEXT.format("id")),
        ("/drain", {"ip": 3}, TEXT.format("ip")),
        ("/scale", {}, "at least one of `min`, `max` and `target` is required"),
        ("/scale", {"min": None}, "at least one of `min`, `max` and `target` is required"),
        ("/scale", {"max": 3, "minimum": 2}, "Object contains unknown field `minimum`"),
        ("/scale", {"a\nb\x1b": 2}, "Object contains unknown field `a?b?`"),
        ("/scale", {"min": 0}, "Expected `int` >= 1 - at `$.min`"),
        ("/scale", {"min": 2.5}, "Expected `int | null`, got `float` - at `$.min`"),
        ("/scale", {"max": 1001}, "Expected `int` <= 1000 - at `$.max`"),
        ("/scale", {"target": 0}, "Expected `float` >= 0.001 - at `$.target`"),
        ("/scale", {"target": float("nan")}, "JSON is malformed: invalid character (byte 11)"),
        ("/scale", {"target": 10**400}, "Number out of range - at `$.target`"),
        ("/scale", {"target": [1]}, "Expected `float | null`, got `array` - at `$.target`"),
        ("/scale", {"min": 11}, "min 11 would be above max 10"),
    ],
)
def test_an_invalid_body_is_refused_and_changes_nothing(manager: Manager, path: str, body: Any, line: str) -> None:
    before = manager.controller.status()
    refused(manager.unix("POST", path, body), 400, line)
    assert manager.controller.status() == before


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b"\xff", "JSON is malformed: invalid character (byte 0)"),
        (
            b'{"ip": "\xff", "balancer": "\xff"}',
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b'{"min": 3} 4', "Object missing required field `{}`"),
        (b"9" * 5000, "Number out of range"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"x":' + b"[" * 100_000, "maximum recursion depth exceeded while deserializing an object"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused_with_400_and_one_line(
    manager: Manager, data: bytes, line: str
) -> None:
    for path, field in (("/pkts_info", "balancer"), ("/stop", "ip")):
        refused(manager.tcp("POST", path, data=data), 400, line.format(field))


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "x", ""])
def test_a_wait_out_of_bounds_is_refused_with_400(manager: Manager, wait: str) -> None:
    answer = manager.tcp("GET", f"/sync?wait={wait}")
    assert (answer.status_code, len(answer.text.splitlines())) == (400, 1)
    assert answer.text.startswith("Expected `float`")
    assert "`$.wait`" in answer.text


def test_an_unknown_address_is_refused_with_404(manager: Manager) -> None:
    line = "no backend of this project has the address 198.18.0.99"
    refused(manager.tcp("POST", "/stop", {"ip": "198.18.0.99", "reason": "drained"}), 404, line)
    refused(manager.unix("POST", "/drain", {"ip": "198.18.0.99"}), 404, line)


def test_a_second_drain_of_a_backend_is_refused_with_409(manager: Manager) -> None:
    manager.unix("POST", "/drain", {"ip": "198.18.0.2"})
    line = "198.18.0.2 is draining; only starting and active backends can be drained"
    refused(manager.unix("POST", "/drain", {"ip": "198.18.0.2"}), 409, line)


@pytest.mark.parametrize(
    ("method", "path", "size", "status", "line"),
    [
        ("GET", "/nowhere", 0, 404, "Not Found"),
        ("GET", "/%3Cscript%3Ealert(1)%3C/script%3E%0A", 0, 404, "Not Found"),
        ("GET", "/stop", 0, 405, "Method Not Allowed"),
        ("POST", "/stop", BODY_MAX + 1, 413, "Request Entity Too Large"),
    ],
)
def test_a_refused_request_gets_one_line_that_repeats_nothing_of_it(
    manager: Manager, method: str, path: str, size: int, status: int, line: str
) -> None:
    refused(manager.tcp(method, path, data=b" " * size), status, line)


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_report_is_answered_with_the_decision(manager: Manager) -> None:
    answer = manager.tcp("POST", "/pkts_info", REPORT).get_json()
    assert answer == {"decision": "OK", "desired": 2, "reason": "no rate before the second report"}
    reason = "150 packets/s over 2 backends = 75 each, target 100 (0.75×)"
    assert manager.report_twice() == {"decision": "OK", "desired": 2, "reason": reason}


def test_a_long_poll_is_answered_when_the_revision_differs_else_with_204_after_the_wait(manager: Manager) -> None:
    snapshot = manager.tcp("GET", "/sync?wait=50").get_json()
    assert snapshot.keys() == {"revision", "service", "backends"}
    assert [b.keys() for b in snapshot["backends"]] == [{"id", "ip", "state"}] * 2
    assert [(b["ip"], b["state"]) for b in snapshot["backends"]] == [
        ("198.18.0.2", "active"),
        ("198.18.0.3", "active"),
    ]
    begun = time.monotonic()
    answer = manager.tcp("GET", f"/sync?have={snapshot['revision']}&wait=0.1")
    assert (answer.status_code, answer.data) == (204, b"")
    assert 0.1 <= time.monotonic() - begun < 1

    drain = threading.Timer(0.05, manager.controller.drain, ["198.18.0.2"])
    drain.start()
    answer = manager.tcp("GET", f"/sync?have={snapshot['revision']}&wait=5")
    assert answer.get_json()["backends"][0]["state"] == "draining"
    drain.join()


def test_a_read_without_the_token_does_not_wait(manager: Manager) -> None:
    """Otherwise a local user, or a page in a local browser, could use up the connections."""
    revision = manager.tcp("GET", "/sync").get_json()["revision"]
    begun = time.monotonic()
    answer = manager.tcp("GET", f"/sync?have={revision}&wait=50", headers={})
    assert (answer.status_code, time.monotonic() - begun < 5) == (204, True)


def test_the_status_has_the_shape_of_the_contract(manager: Manager) -> None:
    manager.report_twice()
    status = manager.tcp("GET", "/status").get_json()
    assert status.keys() >= {
        *("project", "desired", "current", "metric", "rate", "target", "paused", "revision"),
        *("backends", "balancers", "last_decision", "state", "problems"),
    }
    assert (status["project"], status["desired"], status["current"], status["metric"]) == ("p", 2, 2, "packets")
    assert (status["rate"], status["target"], status["paused"]) == (150, 100, False)
    assert status["balancers"] == [{"id": "b1", "last_seen": 0, "revision": "r"}]
    first, second = status["backends"]
    assert first.keys() >= {
        *("name", "ip", "state", "share", "connections", "packets", "bytes", "active", "healthy"),
    }
    assert [first[k] for k in ("name", "ip", "state")] == ["p-backend-1", "198.18.0.2", "active"]
    assert [first[k] for k in ("share", "connections", "packets", "bytes", "active")] == [0.25, 8, 340, 400, 2]
    assert (first["healthy"], second["healthy"], second["packets"]) == (True, None, 0)
    assert abs(first["since"] - time.time()) < 60, "in seconds since 1970"
    assert status["last_decision"]["verdict"] == "OK"
    counts = {"failed": 0, "retry_in": 0, "replaced": 2, "to_replace": 0}
    update = {"updating": False, "phase": "none", "update_given_up": ""}
    assert status["launches"] == {**counts, **update, "why": ""}
    assert status["balancer"] == {"state": "running", "problem": ""}
    assert status["data_path"] == {"working": None, "problem": "", "findings": []}
    assert status["rotation_panic"] == []
    assert (status["state"], status["problems"]) == ("healthy", [])


def test_before_the_first_report_the_status_has_no_numbers_rather_than_zeros(manager: Manager) -> None:
    status = manager.tcp("GET", "/status").get_json()
    assert (status["rate"], status["last_decision"], status["balancers"]) == (None, None, [])


def test_backend_is_stopped_when_a_balancer_reports_it_drained(manager: Manager) -> None:
    manager.unix("POST", "/drain", {"ip": "198.18.0.2"})
    drained = {"ip": "198.18.0.2", "reason": "drained", "balancer": "b1"}
    assert manager.tcp("POST", "/stop", drained).status_code == 204
    assert manager.controller.status()["backends"][0]["state"] == "stopped"


def test_decisions_have_every_number_that_led_to_them(manager: Manager) -> None:
    assert manager.tcp("GET", "/decisions").get_json() == []
    manager.report_twice()
    (decision,) = manager.tcp("GET", "/decisions").get_json()
    assert abs(decision.pop("time") - time.time()) < 60, "in seconds since 1970"
    assert decision == {
        **{"at": 1002, "verdict": "OK", "current": 2, "desired": 2, "rate": 150, "ratio": 0.75, "raw": 2},
        **{"clamps": [], "reason": "150 packets/s over 2 backends = 75 each, target 100 (0.75×)", "panic": False},
    }


def test_prometheus_can_read_the_metrics(manager: Manager) -> None:
    manager.report_twice()
    manager.unix("POST", "/drain", {"ip": "198.18.0.3"})
    answer = manager.tcp("GET", "/metrics")
    assert answer.mimetype == "text/plain"
    samples = {
        (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(answer.text) for s in f.samples
    }
    assert samples["lbscaler_backend_connections_total", "p-backend-1"] == 8 - 4
    assert samples["lbscaler_backend_packets_total", "p-backend-1"] == 340 - 40
    assert samples["lbscaler_backend_bytes_total", "p-backend-1"] == 0, "the same in both reports"
    assert samples["lbscaler_backend_packets_total", "p-backend-2"] == 0
    states = {key[1]: value for key, value in samples.items() if key[0] == "lbscaler_backends"}
    assert states == {"spare": 0, "starting": 0, "active": 1, "draining": 1, "stopped": 0, "failed": 0}
    assert samples[("lbscaler_desired_backends",)] == 2


@pytest.mark.parametrize(("path", "kind"), PARTS.items())
def test_the_page_may_load_and_send_only_to_this_manager(manager: Manager, path: str, kind: str) -> None:
    answer = manager.tcp("GET", path)
    assert (answer.status_code, answer.mimetype) == (200, f"text/{kind}")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    again = manager.tcp("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_browsers_keep_the_big_script_for_a_day_and_check_the_page_each_time(manager: Manager) -> None:
    ages = {path: manager.tcp("HEAD", path).cache_control.max_age for path in PARTS}
    assert ages == {**dict.fromkeys(PARTS, 0), "/plotly.js": 86400}


def test_other_files_are_not_served(manager: Manager) -> None:
    for path in ("/index.html", "/script.py", "/page/page.js", "/..%2fscript.py", "/page.js%2f..%2f..%2fscript.py"):
        refused(manager.tcp("GET", path), 404, "Not Found")


def test_the_history_has_what_is_newer_than_since(manager: Manager) -> None:
    assert manager.tcp("GET", "/history").get_json() == {"points": [], "decisions": []}
    manager.report_twice()
    manager.clock.pass_by(2)
    row = {**ROW, "connections": 99, "packets": 1540}
    manager.tcp("POST", "/pkts_info", {**REPORT, "backends": [row]})
    past = manager.tcp("GET", "/history").get_json()
    first, second = past["points"]
    (decision,) = past["decisions"]
    assert abs(second["time"] - time.time()) < 60, "in seconds since 1970"
    assert decision["time"] == second["time"] == pytest.approx(first["time"] + 2)
    assert first == {"time": first["time"], "rate": 150, "capacity": 200, "backends": 2, "desired": 2}
    assert second == {"time": second["time"], "rate": 375, "capacity": 200, "backends": 2, "desired": 4}
    reason = "375 packets/s over 2 backends = 187.5 each, target 100 (1.88×)"
    numbers = {"verdict": "CREATE_SERVER", "current": 2, "desired": 4, "reason": reason}
    assert decision == {"time": decision["time"], **numbers}
    later = manager.tcp("GET", f"/history?since={first['time']}").get_json()
    assert later == {"points": [second], "decisions": [decision]}
    refused(manager.tcp("GET", "/history?since=x"), 400, "Expected `float`, got `str` - at `$.since`")


def test_the_shares_of_a_backend_are_recorded_every_ten_seconds(manager: Manager) -> None:
    manager.controller._epoch = 0.0
    manager.report_twice()
    for packets in range(1, 7):
        manager.clock.pass_by(2)
        row = {**ROW, "share": 0.1 * packets, "packets": 340 + packets}
        manager.tcp("POST", "/pkts_info", {**REPORT, "backends": [row]})
    found = manager.tcp("GET", "/shares?name=p-backend-1").get_json()
    assert found == {"times": [1002, 1010], "shares": [0.25, 0.4]}
    assert manager.tcp("GET", "/shares?name=p-backend-9").get_json() == {"times": [], "shares": []}


def test_a_backend_with_the_name_of_an_earlier_one_does_not_have_its_shares(manager: Manager) -> None:
    manager.report_twice()
    manager.engine.containers.clear()
    manager.controller.step()
    manager.engine.run("p-backend-1")
    manager.controller.step()
    assert manager.tcp("GET", "/shares?name=p-backend-1").get_json() == {"times": [], "shares": []}


def test_what_if_replays_the_recorded_load_with_other_settings(manager: Manager) -> None:
    manager.report_twice()
    same = manager.tcp("GET", "/what-if").get_json()
    assert same["simulated"] == same["actual"]
    assert same["actual"]["backends"] == [2]
    found = manager.tcp("GET", "/what-if?target=50&stable_window=90&panic_window=10").get_json()
    assert (found["actual"], found["simulated"]["backends"]) == (same["actual"], [3])
    assert found["times"] == same["times"]
    assert manager.controller.status()["desired"] == 2


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("target=", "--target (LB_TARGET) is ''; allowed: 0.001 to 1000000000"),
        ("stable_window=-1", "--stable-window (LB_STABLE_WINDOW) is '-1'; allowed: 1 to 3600 (seconds)"),
        (
            "panic_window=61",
            "--interval 2, --panic-window 61 and --stable-window 60 must not decrease in this order",
        ),
        ("windows=3", "Object contains unknown field `windows`"),
        (f"target={'1' * 31}", "Expected `str` of length <= 30 - at `$.target`"),
    ],
)
def test_what_if_with_an_invalid_or_unknown_setting_is_refused_with_400(
    manager: Manager, query: str, line: str
) -> None:
    refused(manager.tcp("GET", f"/what-if?{query}"), 400, line)


def test_a_replay_does_not_hold_the_lock_of_the_controller(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.report_twice()
    free: list[bool] = []

    def decide(*arguments: Any) -> Any:
        other = threading.Thread(target=lambda: free.append(manager.controller._lock.acquire(timeout=1)))
        other.start()
        other.join()
        return scaler.decide(*arguments)

    monkeypatch.setattr("core.what_if.scaler", SimpleNamespace(decide=decide))
    assert manager.tcp("GET", "/what-if").status_code == 200
    assert free == [True]


def test_the_log_has_the_newest_records_as_fields(manager: Manager) -> None:
    assert manager.tcp("GET", "/log").get_json() == []
    log = logging.Logger("test")
    log.addHandler(manager.log)
    for number in range(KEPT + 1):
        log.warning("record %d <b> →\n", number)
    records = manager.tcp("GET", "/log?lines=2").get_json()
    assert [(r["level"], r["text"]) for r in records] == [("WARNING", f"record {n} <b> →\n") for n in (KEPT - 1, KEPT)]
    assert abs(records[0]["time"] - time.time()) < 60, "in seconds since 1970"
    assert len(manager.tcp("GET", "/log").get_json()) == 100
    oldest = manager.tcp("GET", f"/log?lines={KEPT}").get_json()[0]
    assert oldest["text"].startswith("record 1 "), "memory is bounded"
    refused(manager.tcp("GET", "/log?lines=501"), 400, "Expected `int` <= 500 - at `$.lines`")


def test_a_logged_error_has_its_traceback_in_one_record(manager: Manager) -> None:
    log = logging.Logger("test")
    log.addHandler(manager.log)
    try:
        {}["x"]
    except KeyError:
        log.exception("this pass failed")
    (record,) = manager.tcp("GET", "/log").get_json()
    assert record["text"].startswith("this pass failed\nTraceback")
    assert record["text"].endswith("KeyError: 'x'")


def test_the_status_has_the_settings_in_force_without_secrets(tmp_path: Path) -> None:
    made = controller(
        FakeEngine(), tmp_path, Clock(), env="PASSWORD=sesame", command="db --password sesame", allow="write,root"
    )
    made.scale(3, None, 7.5)
    app = create_app(made, TOKEN, [])
    status = Client(app, app.response_class).get("/status", environ_base={"REMOTE_ADDR": "127.0.0.1"})
    in_force = status.get_json()["settings"]
    assert in_force.keys() == vars(made.settings).keys() - {"env", "command"}
    assert [in_force[name] for name in ("min", "max", "target", "weights")] == [3, 10, 7.5, "adaptive"]
    assert in_force["allow"] == ["root", "write"]
    assert "sesame" not in status.text


def test_an_unexpected_error_is_logged_with_its_traceback_and_answered_in_one_line(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manager.controller, "status", lambda: 1 / 0)
    refused(manager.tcp("GET", "/status"), 500, "the call failed; the manager's log has the error")
    (record,) = caplog.records
    assert (record.name, record.getMessage(), bool(record.exc_info)) == ("manager", "GET /status failed", True)


def test_operator_calls_take_effect(manager: Manager) -> None:
    answer = manager.unix("POST", "/scale", {"min": 3, "max": 4, "target": 7.5}).get_json()
    assert answer == {"min": 3, "max": 4, "target": 7.5, "desired": 3}
    assert manager.unix("POST", "/pause").get_json() == {"paused": True}
    assert manager.tcp("GET", "/status").get_json()["paused"] is True
    assert manager.unix("POST", "/resume").get_json() == {"paused": False}
    assert manager.tcp("GET", "/status").get_json()["paused"] is False
    assert manager.unix("POST", "/drain", {"ip": "198.18.0.3"}).status_code == 204
    assert manager.tcp("GET", "/status").get_json()["backends"][1]["state"] == "draining"


# -- arbitrary requests -----------------------------------------------------------------------------------------------

FIELDS = ["ip", "reason", "balancer", "min", "max", "target", *REPORT, *ROW]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["198.18.0.2", "b1"])
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), v, max_size=4)
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


def check_answer(manager: Manager, answer: TestResponse) -> None:
    """No status 500, a refusal is one line, and the page and the metrics still work afterwards."""
    assert answer.status_code < 500
    assert answer.status_code < 400 or len(answer.text.splitlines()) <= 1
    assert {manager.tcp("GET", path).status_code for path in ("/", "/metrics")} == {200}


@fuzzed
@given(PATHS, METHODS, QUERIES, HEADERS, JSON | st.binary(max_size=50), st.booleans())
def test_no_request_is_answered_with_500(
    manager: Manager, path: str, method: str, query: dict, headers: dict, body: bytes, operator: bool
) -> None:
    client = manager.from_socket if operator else manager.from_tcp
    check_answer(manager, client.open(path, method=method, query_string=query, headers=headers, data=body))


def nearly(good: dict[str, Any]) -> st.SearchStrategy:
    """Bodies that are good but for a field or two, which are anything or not there."""
    wrong = st.dictionaries(st.sampled_from(list(good)), VALUES | st.just(...), max_size=2)
    return wrong.map(lambda changes: {k: v for k, v in {**good, **changes}.items() if v is not ...})


@fuzzed
@given(st.lists(nearly(ROW), max_size=3), nearly(REPORT), st.floats(0, 100))
def test_no_report_is_answered_with_500(manager: Manager, rows: list, body: dict, later: float) -> None:
    manager.clock.pass_by(later)
    body = {**body, "backends": rows} if body.get("backends") == REPORT["backends"] else body
    check_answer(manager, manager.tcp("POST", "/pkts_info", body))


@fuzzed
@given(
    st.sampled_from(["/scale", "/stop", "/drain"]),
    nearly({"min": 1, "max": 9, "target": 1, "ip": "x", "reason": "r", "balancer": "b1"}),
)
def test_no_operator_call_is_answered_with_500(manager: Manager, path: str, body: dict) -> None:
    names = {"/scale": {"min", "max", "target"}}.get(path, {"ip", "reason", "balancer"})
    check_answer(manager, manager.unix("POST", path, {name: value for name, value in body.items() if name in names}))
