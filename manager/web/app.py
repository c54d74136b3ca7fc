"""The manager's HTTP interface: a Flask application over the controller.

It is served on three listeners:
- 127.0.0.1;
- the gateway of the backends' network, or in a Swarm this node's address, with TLS;
- run/<project>/manager.sock (mode 0600), for the operator.

Who may call what:
- Reads from loopback need no token.
- All other calls over TCP need it.
- Operator calls are accepted through the Unix socket only, which needs no token.

ROUTES lists all calls. A request that is refused gets one line of text that says what is wrong.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import msgspec
from flask import Flask, Response, abort, g, request
from prometheus_client import generate_latest
from werkzeug.exceptions import HTTPException

from core.controller import Controller, UnknownBackend
from core.history import Shares
from core.publisher import Closing
from core.settings import SettingError
from core.what_if import WhatIf, policy_with
from web import metrics, schemas
from web.http_server import BODY_MAX
from web.listeners import Busy, Listeners
from web.page import page
from web.recent_log import RecentLog

OPERATOR = "lbscaler.operator"  # in the WSGI environment of requests through the Unix socket
PROMETHEUS = "text/plain; version=0.0.4"

log = logging.getLogger("manager")

Snapshot = dict[str, Any]
WaitForSnapshot = Callable[[str, float], Snapshot | None]
Compute = Callable[[Callable[[], Any]], Any]


class Api:
    """The handlers of all calls. Each takes a decoded request and returns the answer; None becomes status 204."""

    def __init__(
        self, controller: Controller, wait_for_snapshot: WaitForSnapshot, recent_log: RecentLog, compute: Compute
    ) -> None:
        self._controller = controller
        self._wait_for_snapshot = wait_for_snapshot
        self._compute = compute
        self._recent_log = recent_log
        self._registry = metrics.registry(cast("metrics.Tally", controller.recorder), controller.status)

    def sync(self, query: schemas.SyncQuery) -> Snapshot | None:
        """The snapshot of the backends, as soon as its revision differs from `have`; 204 after `wait` seconds."""
        # A long poll keeps a connection open, so only callers with the token may wait. Otherwise any local user, or a
        # web page in a local user's browser, could use up the connections.
        wait = query.wait if g.get("has_token") else 0
        return self._wait_for_snapshot(query.have, wait)

    def pkts_info(self, body: schemas.ReportRequest) -> schemas.ReportAnswer:
        """A balancer's report; the answer is the scaling decision."""
        decision = self._controller.report(body.report())
        if decision is None:
            return schemas.ReportAnswer("OK", self._controller.desired, "no rate before the second report")
        return schemas.ReportAnswer(decision.verdict, decision.desired, decision.reason)

    def stop(self, body: schemas.StopRequest) -> None:
        """A balancer reports that a backend is drained. Idempotent."""
        self._controller.stop(body.ip, body.reason, body.id or "")

    def drain(self, body: schemas.DrainRequest) -> None:
        """Takes a backend out of rotation and replaces it."""
        try:
            self._controller.drain(body.ip)
        except ValueError as error:
            _refuse(409, str(error))

    def scale(self, body: schemas.ScaleRequest) -> schemas.ScaleAnswer:
        """Changes the limits until run.sh sets others; min = max fixes the number of backends."""
        try:
            policy = self._controller.scale(body.min, body.max, body.target)
        except ValueError as error:
            _refuse(400, str(error))
        return schemas.ScaleAnswer(policy.min, policy.max, policy.target, self._controller.desired)

    def pause(self) -> schemas.PauseAnswer:
        """Decisions are still made and recorded, but not carried out."""
        self._controller.pause(True)
        return schemas.PauseAnswer(True)

    def resume(self) -> schemas.PauseAnswer:
        """Decisions are carried out again."""
        self._controller.pause(False)
        return schemas.PauseAnswer(False)

    def status(self) -> dict[str, Any]:
        """The state of the project, with its problems."""
        return self._controller.status()

    def decisions(self) -> list[dict[str, Any]]:
        """The last decisions, oldest first, with every number that led to them."""
        return self._controller.past_decisions()

    def history(self, query: schemas.HistoryQuery) -> dict[str, Any]:
        """The load and the fleet of the last day, and the decisions that changed something."""
        return self._controller.history(query.since)

    def shares(self, query: schemas.SharesQuery) -> Shares:
        """The shares of one backend over the last half hour."""
        return self._controller.shares(query.name)

    def what_if(self, query: schemas.WhatIfQuery) -> WhatIf:
        """The fleet of the last hour, and what it would have been with other settings."""
        texts = {name: text for name, text in msgspec.structs.asdict(query).items() if text is not None}
        try:
            policy = policy_with(self._controller.settings, self._controller.policy, texts)
        except SettingError as error:
            _refuse(400, str(error))
        return cast("WhatIf", self._compute(lambda: self._controller.what_if(policy)))

    def log(self, query: schemas.LogQuery) -> list[schemas.LogRecord]:
        """The newest records of the manager's log."""
        return self._recent_log.newest(query.lines)

    def metrics(self) -> Response:
        """The metrics for Prometheus."""
        return Response(generate_latest(self._registry), mimetype=PROMETHEUS)


JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Route:
    """One call. `answer` is the type of the body with status 200; None if the status is always 204. `statuses` are
    further statuses, in addition to those that any call may have. docs/openapi.yaml is generated from these fields."""

    method: str
    path: str
    handler: Callable[..., Any]
    query: type[Any] | None = None
    body: type[Any] | None = None
    answer: Any = None
    statuses: tuple[int, ...] = ()
    operator_only: bool = False


ROUTES = (
    Route("GET", "/sync", Api.sync, query=schemas.SyncQuery, answer=JsonObject, statuses=(204, 503)),
    Route("POST", "/pkts_info", Api.pkts_info, body=schemas.ReportRequest, answer=schemas.ReportAnswer),
    Route("POST", "/stop", Api.stop, body=schemas.StopRequest, statuses=(404,)),
    Route("POST", "/drain", Api.drain, body=schemas.DrainRequest, statuses=(404, 409), operator_only=True),
    Route("POST", "/scale", Api.scale, body=schemas.ScaleRequest, answer=schemas.ScaleAnswer, operator_only=True),
    Route("POST", "/pause", Api.pause, answer=schemas.PauseAnswer, operator_only=True),
    Route("POST", "/resume", Api.resume, answer=schemas.PauseAnswer, operator_only=True),
    Route("GET", "/status", Api.status, answer=JsonObject),
    Route("GET", "/decisions", Api.decisions, answer=list[JsonObject]),
    Route("GET", "/history", Api.history, query=schemas.HistoryQuery, answer=JsonObject),
    Route("GET", "/shares", Api.shares, query=schemas.SharesQuery, answer=Shares),
    Route("GET", "/what-if", Api.what_if, query=schemas.WhatIfQuery, answer=WhatIf, statuses=(503,)),
    Route("GET", "/log", Api.log, query=schemas.LogQuery, answer=list[schemas.LogRecord]),
    Route("GET", "/metrics", Api.metrics, answer=str),
)


def create_app(
    controller: Controller,
    token: str,
    hosts: Iterable[str],
    wait_for_snapshot: WaitForSnapshot | None = None,
    recent_log: RecentLog | None = None,
    *,
    compute: Compute | None = None,
) -> Flask:
    """The application. A Host header may name loopback or one of `hosts`; others are refused, against DNS rebinding.
    `wait_for_snapshot` is how a long poll waits, `compute` calls a function that takes long; by default, both block the
    thread."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX
    app.before_request(_guard(token, {"127.0.0.1", "localhost", *hosts}))
    app.register_blueprint(page)
    wait = wait_for_snapshot or controller.wait_for_snapshot
    api = Api(controller, wait, recent_log or RecentLog(), compute or (lambda function: function()))
    for route in ROUTES:
        app.add_url_rule(route.path, route.path, _view(route, api), methods=[route.method])

    # Errors are answered with one line of text.
    for status in (404, 405, 413):
        app.register_error_handler(status, lambda error: _line(error.code, error.name))
    app.register_error_handler(schemas.InvalidMessage, lambda error: _line(400, str(error)))
    unknown = "no backend of this project has the address"
    app.register_error_handler(UnknownBackend, lambda error: _line(404, f"{unknown} {error}"))
    app.register_error_handler(Closing, lambda _: _line(503, "the manager is ending; retry in a few seconds"))
    app.register_error_handler(Busy, lambda _: _line(503, "other callers replay the load; retry in a few seconds"))
    app.register_error_handler(Exception, _failed)
    return app


def _failed(error: Exception) -> Response | HTTPException:
    """The answer to a request whose handler failed unexpectedly."""
    if isinstance(error, HTTPException):
        return error
    log.exception("%s %s failed", request.method, request.path)
    return _line(500, "the call failed; the manager's log has the error")


def _guard(token: str, allowed_hosts: set[str]) -> Callable[[], None]:
    """Returns the check that runs before each route: it refuses a wrong Host header and a missing token."""

    def guard() -> None:
        if request.environ.get(OPERATOR):
            return
        # DNS rebinding: a web site can make its own name resolve to this host. Its page, in a browser on this host,
        # could then read the answers.
        if request.host not in allowed_hosts and request.host.rpartition(":")[0] not in allowed_hosts:
            _refuse(403, "the Host header is not an address of this manager")
        # The comparison takes the same time for every wrong token, so the time does not help to guess the right one.
        sent = request.headers.get("Authorization", "").encode()
        g.has_token = hmac.compare_digest(sent, f"Bearer {token}".encode())
        # Prometheus and browsers on this host read without the token.
        is_read = request.method in ("GET", "HEAD")
        is_local = str(request.remote_addr).startswith("127.")
        if not g.has_token and not (is_read and is_local):
            _refuse(401, "this call needs the token: Authorization: Bearer <run/PROJECT/token>")

    return guard


def _view(route: Route, api: Api) -> Callable[[], Response]:
    """Flask's view of a route: decodes the request, calls the handler, encodes the answer."""

    def view() -> Response:
        if route.operator_only and not request.environ.get(OPERATOR):
            _refuse(403, "operator calls are accepted through run/PROJECT/manager.sock only")
        arguments = []
        if route.query is not None:
            arguments.append(schemas.decode_query(request.args.to_dict(), route.query))
        if route.body is not None:
            arguments.append(schemas.decode(request.get_data(), route.body))
        answer = route.handler(api, *arguments)
        if isinstance(answer, Response):  # not JSON
            return answer
        if answer is None:
            return Response(status=204)
        # The hook is for schemas.Text, a type that msgspec does not know.
        body = msgspec.json.encode(answer, enc_hook=str)
        return Response(body + b"\n", mimetype="application/json")

    return view


def _refuse(status: int, text: str) -> NoReturn:
    abort(_line(status, text))


def _line(status: int, text: str) -> Response:
    return Response(f"{text}\n", status, mimetype="text/plain")


def as_operator(app: Flask) -> Callable[..., Any]:
    """The same application for requests through the Unix socket: they may make operator calls, without the token."""

    def operated(environ: dict[str, Any], start_response: Any) -> Any:
        return app.wsgi_app({**environ, OPERATOR: True}, start_response)

    return operated


def waits_in(listeners: Listeners, controller: Controller) -> WaitForSnapshot:
    """Returns a function that waits for a snapshot without blocking the thread that all listeners share."""

    def wait_for_snapshot(have: str, seconds: float) -> Snapshot | None:
        return listeners.wait_for(lambda: controller.wait_for_snapshot(have, 0), seconds)

    return wait_for_snapshot
