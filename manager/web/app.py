"""The manager's HTTP interface: a Flask application over the controller, served on three listeners.

127.0.0.1 and the backends' network's gateway (TCP; in a Swarm this node's address, within TLS), and
run/<project>/manager.sock (mode 0600) for the operator. Reads are free on loopback; whatever comes from elsewhere or
changes anything bears the token; what only the operator may do goes through the socket alone. Every refusal is one line
of text: what was wrong and what is allowed.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, cast

from flask import Flask, Response, abort, g, jsonify, request
from prometheus_client import generate_latest

from core.controller import Controller, UnknownBackend
from core.load import Finding, Report, Sample
from core.publisher import Closing
from web import metrics
from web.http_server import BODY_MAX
from web.listeners import Listeners

OPERATOR = "lbscaler.operator"  # in the WSGI environment of requests through the Unix socket
LONGEST_WAIT = 60.0  # seconds a long poll may hold a connection
COUNTERS = ("connections", "packets", "bytes", "active")
TAIL = 1 << 18  # bytes at the end of a log in which its last lines are searched
PAGE = Path(__file__).with_name("static")
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# No byte of the page comes from elsewhere or goes there; plotly writes style elements.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Snapshot = dict[str, Any]
WaitForSnapshot = Callable[[str, float], Snapshot | None]


def create_app(  # noqa: PLR0915 - a list of routes
    controller: Controller, token: str, hosts: Iterable[str], wait_for_snapshot: WaitForSnapshot | None = None
) -> Flask:
    """The routes. `hosts` are the names and addresses a Host header may bear (else: DNS rebinding). `wait_for_snapshot`
    is how a long poll waits: by default as Controller.wait_for_snapshot does, which blocks the thread."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX
    allowed_hosts = {"127.0.0.1", "localhost", *hosts}
    wait_for_snapshot = wait_for_snapshot or controller.wait_for_snapshot
    told = metrics.registry(cast("metrics.Tally", controller.recorder), controller.status)

    @app.before_request
    def guard() -> None:
        if request.environ.get(OPERATOR):
            return
        if request.host.rpartition(":")[0] not in allowed_hosts and request.host not in allowed_hosts:
            _refuse(403, "this Host is not one of the manager's")
        given = request.headers.get("Authorization", "").encode()
        trusted = hmac.compare_digest(given, f"Bearer {token}".encode())
        g.trusted = trusted
        free = request.method in ("GET", "HEAD") and str(request.remote_addr).startswith("127.")
        if not trusted and not free:
            _refuse(401, "this call needs the token: Authorization: Bearer <run/PROJECT/token>")

    def operator_only() -> None:
        if not request.environ.get(OPERATOR):
            _refuse(403, "the operator's calls go through run/PROJECT/manager.sock only")

    @app.get("/sync")
    def sync() -> Response | tuple[str, int]:
        wait = _number(request.args.get("wait", "0"), "wait", 0, LONGEST_WAIT)
        if not g.get("trusted"):
            wait = 0  # a long poll holds a connection: not for everybody on this host, or any page they visit
        try:
            view = wait_for_snapshot(request.args.get("have", ""), wait)
        except Closing:
            _refuse(503, "this manager ends; ask again in a few seconds")
        return jsonify(view) if view is not None else ("", 204)

    @app.post("/pkts_info")
    def pkts_info() -> Response:
        decision = controller.report(parse_report(_body()))
        if decision is None:
            return jsonify(decision="OK", desired=controller.desired, reason="no rate before the second report")
        return jsonify(decision=decision.verdict, desired=decision.desired, reason=decision.reason)

    @app.post("/stop")
    def stop() -> tuple[str, int]:
        body = _body()
        balancer = _text(body, "balancer") if "balancer" in body else ""
        return _on_backend(lambda: controller.stop(_text(body, "ip"), _text(body, "reason"), balancer))

    @app.post("/drain")
    def drain() -> tuple[str, int]:
        operator_only()
        return _on_backend(lambda: controller.drain(_text(_body(), "ip")))

    @app.post("/scale")
    def scale() -> Response:
        operator_only()
        body = _body()
        if not body or body.keys() - {"min", "max", "target"}:
            _refuse(400, "/scale takes min, max (1 to 1000) and target (above 0)")
        bounds = [_whole(body, name, 1, 1000) if name in body else None for name in ("min", "max")]
        target = _number(body["target"], "target", 0.001, 1e9) if "target" in body else None
        try:
            policy = controller.scale(bounds[0], bounds[1], target)
        except ValueError as error:
            _refuse(400, str(error))
        return jsonify(min=policy.min, max=policy.max, target=policy.target, desired=controller.desired)

    @app.post("/pause", defaults={"paused": True})
    @app.post("/resume", defaults={"paused": False}, endpoint="resume")
    def pause(paused: bool) -> Response:
        operator_only()
        controller.pause(paused)
        return jsonify(paused=paused)

    @app.get("/status")
    def status() -> Response:
        return jsonify(controller.status())

    @app.get("/decisions")
    def decisions() -> Response:
        return jsonify(controller.history())

    @app.get("/metrics")
    def exposition() -> Response:
        return Response(generate_latest(told), mimetype="text/plain; version=0.0.4")

    @app.get("/history")
    def past() -> Response:
        return jsonify(controller.past(_number(request.args.get("since", "0"), "since", 0, 1e12)))

    @app.get("/log")
    def tail_of_log() -> Response:
        lines = int(_number(request.args.get("lines", "100"), "lines", 1, 500))
        return Response(tail(controller.settings.run_dir / "manager.log", lines), mimetype="text/plain")

    @app.get("/", defaults={"name": "index.html"})
    @app.get("/<any('page.js', 'charts.js', 'page.css'):name>", endpoint="page_part")
    def page(name: str) -> Response:
        return _part(name, (PAGE / name).read_bytes())

    @app.get("/plotly.js")
    def plotly() -> Response:
        return _part("plotly.js", _plotly(), max_age=86400)

    @app.after_request
    def confine(answer: Response) -> Response:
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    @app.errorhandler(404)
    @app.errorhandler(405)
    @app.errorhandler(413)
    def refuse_plainly(error: Any) -> Response:
        return Response(f"{error.name}\n", error.code, mimetype="text/plain")

    return app


def parse_report(body: dict[str, Any]) -> Report:
    """Reads the body of POST /pkts_info; aborts with one line of 400 for anything that is not a report."""
    rows = body.get("backends")
    if not isinstance(rows, list) or len(rows) > 10_000 or not all(isinstance(row, dict) for row in rows):
        _refuse(400, "backends has to be a list of at most 10000 objects")
    backends = {}
    for row in rows:
        healthy = row.get("healthy")
        if healthy not in (True, False, None):
            _refuse(400, "healthy has to be true, false or null")
        connections, packets, size, active = (_whole(row, name, 0, 2**64) for name in COUNTERS)
        share = _number(row["share"], "share", 0, 1) if "share" in row else None
        id_ = _text(row, "id") if "id" in row else ""
        why = _text(row, "why") if "why" in row else ""
        cause = _text(row, "cause") if "cause" in row else ""
        backends[_text(row, "ip")] = Sample(connections, packets, size, active, healthy, share, id_, why, cause)
    interval = _number(body.get("interval"), "interval", 0.1, 3600)
    warnings = body.get("warnings", [])
    if not isinstance(warnings, list) or len(warnings) > 10:
        _refuse(400, "warnings has to be a list of at most 10 texts")
    words = tuple(_text({"warning": warning}, "warning") for warning in warnings)
    uptime = _number(body["uptime"], "uptime", 0, 1e12) if "uptime" in body else None
    panic = body.get("panic", False)
    if not isinstance(panic, bool):
        _refuse(400, "panic has to be true or false")
    return Report(
        _text(body, "balancer"), _text(body, "revision"), interval, backends, words, uptime, panic, _findings(body)
    )


def _findings(body: dict[str, Any]) -> tuple[Finding, ...]:
    rows = body.get("findings", [])
    if not isinstance(rows, list) or len(rows) > 20 or not all(isinstance(row, dict) for row in rows):
        _refuse(400, "findings has to be a list of at most 20 objects")
    return tuple(Finding(_text(row, "kind"), _text(row, "detail") if row.get("detail") else "") for row in rows)


def tail(path: Path, lines: int) -> str:
    """A log's last lines, of which its end alone is read; nothing where there is none, as just after a rotation."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            read_ = file.read(TAIL)
    except FileNotFoundError:
        return ""
    whole = read_.partition(b"\n")[2] if start else read_
    return b"".join(whole.splitlines(keepends=True)[-lines:]).decode(errors="replace")


@cache  # 4 MB that every answer has in common, however many callers take it slowly
def _plotly() -> bytes:
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()


def _part(name: str, content: bytes, max_age: int = 0) -> Response:
    """A part of the page, or 304 for a browser that has it."""
    answer = Response(content, mimetype=TYPES[name.rpartition(".")[2]])
    answer.cache_control.max_age = max_age
    answer.add_etag()
    answer.make_conditional(request)
    return answer


def _body() -> dict[str, Any]:
    try:
        body = request.get_json(force=True, silent=True)
    except RecursionError:  # brackets a hundred thousand deep
        body = None
    if not isinstance(body, dict):
        _refuse(400, "the body has to be a JSON object")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 300 or not value.isprintable():
        _refuse(400, f"{name} has to be a text of 1 to 300 printable characters")
    return value


def _whole(body: dict[str, Any], name: str, low: int, high: int) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(400, f"{name} has to be a whole number from {low} to {high}")
    return value


def _number(value: Any, name: str, low: float, high: float) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        _refuse(400, f"{name} has to be a number from {low:g} to {high:g}")
    return number


def _on_backend(action: Callable[[], None]) -> tuple[str, int]:
    try:
        action()
    except UnknownBackend as error:
        _refuse(404, f"no backend of ours has the address {error}")
    except ValueError as error:
        _refuse(409, str(error))
    return "", 204


def _refuse(status: int, line: str) -> NoReturn:
    abort(Response(f"{line}\n", status, mimetype="text/plain"))


def as_operator(app: Flask) -> Callable[..., Any]:
    """The same application, for requests that came through the operator's socket."""

    def operated(environ: dict[str, Any], start_response: Any) -> Any:
        return app.wsgi_app({**environ, OPERATOR: True}, start_response)

    return operated


def waits_in(listeners: Listeners, controller: Controller) -> WaitForSnapshot:
    """Waits for a view without blocking the thread that all listeners share."""

    def wait_for_snapshot(have: str, seconds: float) -> Snapshot | None:
        return listeners.wait_for(lambda: controller.wait_for_snapshot(have, 0), seconds)

    return wait_for_snapshot
