"""Every parser with arbitrary input: it ends, returns the right types, and raises only the errors that it documents.

Each `example` is an input that once failed, or that a parser must not misunderstand: they are the corpus, and always
run. HYPOTHESIS_PROFILE=long searches for minutes and keeps what it finds in .hypothesis.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ctnetlink
import findings
import flows
from cli.arguments import Arguments, run_arguments
from core import backend_files
from core.engine import EngineError, Event
from core.fleet import STATES
from core.load import Report
from core.reasons import Reason
from core.scaler import Policy
from core.settings import SETTINGS, SettingError, Settings, read, stored, variable
from core.state_files import StateFiles, digest
from datapath import DataPath, from_environment
from engines import docker_engine, swarm_claim, swarm_tasks
from engines.failure_hints import failure_hint, with_hint
from fakes_netfilter import TIMEOUTS
from listings import connections, parse_set, parse_table
from netfilter import NetfilterError, _connection_table
from prober import answer_to
from snapshot import Backend, Snapshot
from web import schemas
from web.schemas import MAX_TEXT, InvalidMessage

PORTS = frozenset({8000})
A = "198.18.0.2"

TEXT = st.text(max_size=60)
# As JSON decodes, with the numbers that Python's decoder accepts beyond JSON's own.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
in_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example replaces the file


def nearly(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """`good` with up to two fields that are anything or missing."""
    wrong = st.dictionaries(st.sampled_from(list(good)), VALUES | st.just(...), max_size=2)
    return wrong.map(lambda changes: {key: value for key, value in {**good, **changes}.items() if value is not ...})


# -- the balancer: listings -------------------------------------------------------------------------------------------

LISTING_WORDS = st.sampled_from(
    [":", "-A ", "LB-B-198.18.0.2", "[1:60] ", "[", "-", " ", "-j DNAT", "-j DROP", "ACCEPT", "*nat", "COMMIT", "\n"]
)


@given(st.text() | st.lists(LISTING_WORDS | TEXT).map("".join))
@example(":")
@example(":PREROUTING")
@example(": -")
@example(f"[{'9' * 5000}:0] -A LB-B-{A} -j DNAT")
@example("[\u0663:0] -A LB-B-x -j DNAT")  # a digit, but none of iptables'
@example(':OTHER - [0:0]\n[0:0] -A OTHER -m comment --comment "\n:LB-B-x - [0:0]" -j DROP')
@example(f':FORWARD DROP [0:0]\n[0:0] -A FORWARD -m comment --comment "\x7f{"x" * 250}" -s {"y" * 60} -j DROP')
def test_tables(text: str) -> None:
    listing = parse_table(text)
    for chain, rules in listing.chains.items():
        assert isinstance(chain, str)
        assert all(isinstance(rule, str) for rule in rules)
    for counted in (listing.packets, listing.dropped, connections(listing)):
        assert all(isinstance(name, str) and 0 <= number < 2**67 for name, number in counted.items())
    assert all(isinstance(policy, str) and policy for policy in listing.policies.values())
    found = findings.find(True, {"filter": listing, "nat": listing})
    assert len(found) <= findings.MAX_FINDINGS
    for finding in found:  # a finding that the manager refuses would be the end of all reports
        schemas.decode(json.dumps(finding.message()).encode(), schemas.FindingRow)


SET_WORDS = st.sampled_from(["add LB-BACKENDS ", A, " packets ", " bytes ", "12", "\n", "create LB-BACKENDS hash:ip"])


@given(st.text() | st.lists(SET_WORDS | TEXT).map("".join))
@example(f"add LB-BACKENDS {A} packets {'9' * 5000} bytes 1")
def test_sets(text: str) -> None:
    for member, counted in parse_set(text, "LB-BACKENDS").items():
        assert isinstance(member, str)
        assert all(0 <= number < 2**67 for number in counted)


# -- the balancer: netlink --------------------------------------------------------------------------------------------


def tuple_of(source: str, port: int) -> bytes:
    addresses = flows.attribute(1, IPv4Address(source).packed) + flows.attribute(2, bytes(4))
    numbers = (
        flows.attribute(1, b"\x06") + flows.attribute(2, b"\x9c\x40") + flows.attribute(3, struct.pack("!H", port))
    )
    return flows.attribute(0x8001, addresses) + flows.attribute(0x8002, numbers)


ENTRY = flows.message(
    *(0, 0, 0),
    flows.attribute(0x8001, tuple_of("203.0.113.9", 8000))
    + flows.attribute(0x8002, tuple_of(A, 1024))
    + flows.attribute(7, struct.pack("!I", 86000))
    + flows.attribute(0x8004, flows.attribute(0x8001, flows.attribute(1, b"\x03")))
    + flows.attribute(12, struct.pack("!I", 77)),
)
PLACES = st.integers(0, len(ENTRY) - 1)


def damaged(changes: dict[int, int], length: int) -> bytes:
    block = bytearray(ENTRY * 2)
    for place, value in changes.items():
        block[place] = value
    return bytes(block[:length])


@given(
    st.binary(max_size=300)
    | st.builds(damaged, st.dictionaries(PLACES, st.integers(0, 255), max_size=4), st.integers(0, 2 * len(ENTRY)))
)
@example(bytes(20))  # a message of no length
@example(struct.pack("=I", 24) + bytes(16) + struct.pack("=HH", 0, 1))  # an attribute of no length
@example(struct.pack("=I", 0xFFFFFFFF) + bytes(40))
@example(ENTRY[:-8])
@example(flows.message(0, 0, 0, flows.attribute(4, bytes(16)) + flows.attribute(7, bytes(4))))  # without a tuple
def test_blocks_of_the_connection_table(block: bytes) -> None:
    with suppress(ValueError):
        seen = list(flows.flows(block, PORTS))
        assert all(len(flow.source) == len(flow.backend) == 4 and 0 <= flow.state < 256 for flow in seen)
        counts = flows.count(seen, TIMEOUTS, A)
        assert counts.live.total() <= len(seen)
    with suppress(ValueError):
        assert all(
            isinstance(attributes, bytes) for attributes in flows.deletions(block, PORTS, flows.of_backends([A], False))
        )


@given(st.lists(st.binary(max_size=40), max_size=3))
@example([b""])
@example([bytes(15)])
@example([struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_ERROR, 0, 0, 0, -(2**31))])
def test_answers_on_the_netlink_socket(answers: list[bytes]) -> None:
    received = iter([*answers, struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_DONE, 0, 0, 0, 0)])
    netlink = SimpleNamespace(settimeout=lambda _: None, recv=lambda _: next(received))
    with suppress(NetfilterError), _connection_table():
        while True:
            answer = ctnetlink._receive(netlink, float("inf"))  # type: ignore[arg-type]
            ctnetlink.raise_error(answer)
            if ctnetlink.kind_of(answer) == ctnetlink.NLMSG_DONE:
                break
            list(flows.flows(answer, PORTS))


# -- the balancer: the manager's answers, its variables, the backends' answers -----------------------------------------

SERVICE = {
    **{"port": 8000, "health": "tcp", "interval": 2.0, "drain_timeout": 30.0, "weights": "equal"},
    **{"locality": "", "check_source": A},
}
ROW = {"id": "a", "ip": A, "state": "active", "node": "n"}
MESSAGE = {"revision": "r", "service": SERVICE, "backends": [ROW]}


@given(
    VALUES
    | nearly(MESSAGE)
    | st.builds(lambda service, row: {**MESSAGE, "service": service, "backends": [row]}, nearly(SERVICE), nearly(ROW))
)
@example({**MESSAGE, "service": {**SERVICE, "port": float("inf")}})  # JSON of Python may have it
@example({**MESSAGE, "service": {**SERVICE, "interval": float("nan")}})
@example({**MESSAGE, "revision": ["r"]})
@example({**MESSAGE, "backends": [{**ROW, "ip": True}]})
def test_snapshots(message: Any) -> None:
    with suppress(KeyError, TypeError, ValueError):
        snapshot = Snapshot.parse(message)
        texts = [snapshot.revision, snapshot.health, snapshot.weights, snapshot.locality, snapshot.check_source]
        for backend in snapshot.backends:
            assert isinstance(backend, Backend)
            assert str(IPv4Address(backend.ip)) == backend.ip
            texts += [backend.id, backend.state, backend.node]
        assert all(isinstance(text, str) for text in texts)
        assert isinstance(snapshot.port, int)
        assert 0 < snapshot.port < 65536
        assert all(isinstance(n, float) and 0 <= n <= 3600 for n in (snapshot.interval, snapshot.drain_timeout))


@given(st.dictionaries(st.sampled_from(["LB_PORTS", "LB_PREFIX", "LB_STICKY", "LB_SUBNET"]), TEXT))
@example({"LB_PORTS": "9" * 5000 + ":1"})
def test_variables_of_the_data_path(environ: dict[str, str]) -> None:
    with suppress(ValueError):
        path = from_environment(environ)
        assert isinstance(path, DataPath)
        assert all(isinstance(port, int) for pair in path.ports for port in pair)


@given(st.binary(max_size=100) | st.integers().map(lambda number: b"HTTP/1.1 %d OK\r\n" % number))
@example(b"HTTP/1.1 " + b"9" * 4000)  # a text too long for the manager, which would refuse all reports
@example(b"HTTP/1.1 2_0_0 OK")
@example(b"")
@example(b"SSH-2.0-x\x1b[2J\r\n")
def test_answers_to_probes(line: bytes) -> None:
    for method in ("sync", "http:/healthz"):
        answer = answer_to(line, method, "GET /healthz on port 8000")
        assert len(answer.why) <= MAX_TEXT
        assert answer.why.isprintable()
        assert answer.cause is not None or line.split()[1].isdigit()


# -- the manager: reports and other messages ---------------------------------------------------------------------------

COUNTERS = {"connections": 1, "packets": 2, "bytes": 3, "active": 4}
REPORT_ROW = {"ip": A, **COUNTERS, "healthy": True, "share": 0.5, "id": "a", "why": "w", "cause": "refused"}
REPORT = {
    **{"balancer": "b", "revision": "r", "interval": 2.0, "backends": [REPORT_ROW], "warnings": ["full"]},
    **{"uptime": 1.0, "panic": False, "findings": [{"kind": "k", "detail": "d"}]},
}
BODIES = st.binary() | (VALUES | nearly(REPORT)).map(lambda value: json.dumps(value).encode())
MESSAGES = (schemas.ReportRequest, schemas.StopRequest, schemas.DrainRequest, schemas.ScaleRequest)


@given(BODIES | nearly(REPORT_ROW).map(lambda row: json.dumps({**REPORT, "backends": [row]}).encode()))
@example(b"[" * 100_000)
@example(b'{"balancer": "' + b"\\ud800" * 2 + b'"}')
@example(b'{"ip": 1e999}')
def test_bodies(body: bytes) -> None:
    for message in MESSAGES:
        try:
            decoded = schemas.decode(body, message)
        except InvalidMessage as error:
            assert str(error).isprintable()
            assert len(str(error)) <= MAX_TEXT
        else:
            assert isinstance(decoded, message)
            if isinstance(decoded, schemas.ReportRequest):
                assert isinstance(decoded.report(), Report)


@given(st.dictionaries(st.sampled_from(["have", "wait", "since", "lines", "x"]), TEXT | st.floats().map(str)))
@example({"lines": "9" * 5000})
def test_queries(arguments: dict[str, str]) -> None:
    for message in (schemas.SyncQuery, schemas.HistoryQuery, schemas.LogQuery):
        with suppress(InvalidMessage):
            assert isinstance(schemas.decode_query(arguments, message), message)


# -- the manager: settings ---------------------------------------------------------------------------------------------

SETTING_TEXTS = TEXT | st.sampled_from(["1", "0.5", "80:8080", "A=b", "a=/b", "'", "198.18.0.0/16", "http:/x", "all"])


@given(st.dictionaries(st.sampled_from([variable(name) for name in SETTINGS]), SETTING_TEXTS, max_size=3))
@example({"LB_PUBLISH": "\u0661:\u0662"})
@example({"LB_SUBNET": "0/8"})
@example({"LB_ENV": "'"})
def test_variables(environ: dict[str, str]) -> None:
    try:
        found = read(environ)
    except SettingError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, Settings)
        assert found.min <= found.max


FLAGS = st.sampled_from(["--max", "--env", "--publish", "--watch", "--json", "--", "-", "3", "--max=4", "--no-wait"])


@given(st.lists(FLAGS | TEXT, max_size=4))
@example(["9" * 5000])
@example(["\u00b2"])
def test_flags(words: list[str]) -> None:
    with suppress(SettingError, SystemExit):  # --help and --version end the program
        assert isinstance(run_arguments(words, {}), Arguments)


@in_files
@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
def test_stored_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    (tmp_path / "run" / "p").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "p" / "settings.json").write_bytes(content)
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in stored("p").items())


# -- the manager: files ------------------------------------------------------------------------------------------------


@in_files
@given(
    st.binary()
    | st.lists(st.sampled_from(["A=b", "#", " ", "=", "\r", "\n", "\0", "A"])).map(lambda x: "".join(x).encode())
)
@example(b"\xff\xfeA=b")
@example(b"A=\0")
@example(b"\0=")
def test_env_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "env"
    path.write_bytes(content)
    with suppress(SettingError, UnicodeDecodeError):
        for line in backend_files.environment([str(path)], ()):
            name, equals, value = line.partition("=")
            assert name
            assert equals
            assert "\n" not in value
            assert "\0" not in line


@given(TEXT)
@example("9" * 5000)
@example("\u0661")
def test_users_of_images(user: str) -> None:
    number = backend_files.user_id(read({}), user)
    assert number is None or 0 <= number < 2**32


OPERATOR = {"min": 2, "max": 9, "target": 5.0, "paused": False}


@in_files
@given(st.binary() | (VALUES | nearly(OPERATOR)).map(lambda value: json.dumps(value).encode()))
@example(b'{"min": "2", "max": 9, "target": 5, "paused": false}')
@example(b'{"min": 9, "max": 2, "target": 5, "paused": false}')
@example(b'{"min": 2, "max": Infinity, "target": NaN, "paused": false}')
@example(b"[" * 100_000)
def test_operator_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "operator_settings.json").write_bytes(content)
    policy, paused = StateFiles(tmp_path / "ip.txt").read_operator_settings(Policy(2, 10, 100))
    assert isinstance(paused, bool)
    assert 1 <= policy.min <= policy.max
    assert policy.target > 0
    assert all(isinstance(number, int) for number in (policy.min, policy.max))


SAVED = {"desired": 3, "states": {"c1": "active", "c2": "draining"}}


@in_files
@given(st.binary() | (VALUES | nearly(SAVED)).map(lambda value: json.dumps(value).encode()))
@example(b'{"desired": -1, "states": {}}')
@example(b'{"desired": 2, "states": {"c1": "gone"}}')
@example(b'{"desired": 2, "states": ["c1"]}')
def test_saved_fleet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fleet.json").write_bytes(content)
    saved = StateFiles(tmp_path / "ip.txt").read_fleet()
    assert isinstance(saved.desired, int)
    assert saved.desired >= 0
    assert set(saved.states.values()) <= set(STATES)


REASON = {"cause": "ended", "value": 3.0, "detail": "d", "last_log_line": "l"}


@in_files
@given(
    nearly({"spec": digest("s"), "reason": REASON}) | nearly(REASON).map(lambda r: {"spec": digest("s"), "reason": r})
)
@example({"spec": digest("s"), "reason": {**REASON, "value": "3"}})
@example({"spec": digest("s"), "reason": {**REASON, "value": float("nan")}})
def test_refused_updates(tmp_path: Path, saved: Any) -> None:
    (tmp_path / "refused_update.json").write_text(json.dumps(saved))
    reason = StateFiles(tmp_path / "ip.txt").read_refusal("s")
    assert isinstance(reason, Reason)
    assert isinstance(reason.sentence, str)


# -- the manager: the engine ------------------------------------------------------------------------------------------

EVENT = {"Action": "die", "Actor": {"ID": "c", "Attributes": {"exitCode": "3"}}}
ATTRIBUTES = st.dictionaries(st.sampled_from(["exitCode", "signal"]), VALUES).map(
    lambda attributes: {**EVENT, "Actor": {"ID": "c", "Attributes": attributes}}
)


@in_files
@given(st.lists(VALUES | nearly(EVENT) | ATTRIBUTES, max_size=3))
@example([{**EVENT, "Actor": {"ID": "c", "Attributes": {"exitCode": "9" * 5000}}}])
@example([{**EVENT, "Action": ["die"]}])
def test_events(monkeypatch: pytest.MonkeyPatch, stream: list[Any]) -> None:
    class Stream(list[Any]):
        def close(self) -> None:
            pass

    client = SimpleNamespace(events=lambda **_: Stream(stream), close=lambda: None)
    monkeypatch.setattr(docker_engine.docker, "from_env", lambda timeout: client)
    with suppress(EngineError):
        for event in docker_engine.DockerEngine.events(SimpleNamespace()):  # type: ignore[arg-type] # uses no field
            assert isinstance(event, Event)
            kinds = [type(value) for value in (event.action, event.id, event.code)]
            assert kinds == [str, str, int]


TASK = {
    **{"ID": "t", "Slot": 1, "NodeID": "n", "DesiredState": "running"},
    "Spec": {"ContainerSpec": {"Labels": {"lbscaler.template": "s"}}},
    "Status": {"State": "running", "ContainerStatus": {"ContainerID": "c", "ExitCode": 0}, "Err": ""},
    "NetworksAttachments": [{"Network": {"Spec": {"Name": "p"}}, "Addresses": [f"{A}/24"]}],
}


@given(nearly(TASK))
def test_tasks(listed: dict[str, Any]) -> None:
    # What else is wrong with an answer of the engine, engine_errors turns into an EngineError.
    with suppress(KeyError, TypeError, AttributeError, ValueError, IndexError):
        assert isinstance(swarm_tasks.parse_task(listed, "p").ip, str)


@given(TEXT)
@example("9" * 5000 + " here")
@example("\u0661 here")
def test_claims(label: str) -> None:
    number, owner = swarm_claim.parse_claim(label)
    assert isinstance(number, int)
    assert isinstance(owner, str)


@given(TEXT, st.none() | st.integers(0, 255), st.booleans())
@example("permission denied\n" * 20_000, 1, False)
def test_last_log_lines(log: str, code: int | None, out_of_memory: bool) -> None:
    assert isinstance(with_hint(log, failure_hint(log, code, out_of_memory)), str)
