"""The messages of the HTTP interface: the fields of each request and answer, with their limits.

msgspec checks these types while it decodes a request, so a handler receives valid messages only. `docs/openapi.yaml` is
generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from core.load import Finding, Report, Sample

LONGEST_WAIT = 60.0  # seconds for which a long poll may hold a connection
MAX_TEXT = 300  # characters
MAX_BACKENDS, MAX_WARNINGS, MAX_FINDINGS = 10_000, 10, 20  # rows in one report

T = TypeVar("T")


class InvalidMessage(ValueError):
    """A request does not have the fields that its call needs. The message is one line for the caller."""


class Text(str):
    """1 to MAX_TEXT printable characters, so that each text is one line in a log or a terminal."""

    __slots__ = ()


# The upper limit is the largest that msgspec checks. A byte counter at 100 Gbit/s needs 23 years to get there.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
BackendLimit = Annotated[int, Meta(ge=1, le=1000)]


class BackendRow(Struct):
    """One backend in a report. The counters only grow, from zero when the balancer starts."""

    ip: Text
    connections: Count
    packets: Count
    bytes: Count
    active: Annotated[Count, Meta(description="open connections")]
    healthy: Annotated[bool | None, Meta(description="null: no probe has been answered yet")] = None
    share: Annotated[Share | None, Meta(description="part of this balancer's new connections")] = None
    id: Annotated[Text | None, Meta(description="the container's id")] = None
    why: Annotated[Text | None, Meta(description="result of the last probe, a text for people")] = None
    cause: Annotated[Text | None, Meta(description="kind of failure of an unhealthy backend")] = None

    def sample(self) -> Sample:
        counters = self.connections, self.packets, self.bytes, self.active
        return Sample(*counters, self.healthy, self.share, self.id or "", self.why or "", self.cause or "")


class FindingRow(Struct):
    """A problem of the data path that a balancer found outside its own rules."""

    kind: Text
    detail: Text | None = None


class ReportRequest(Struct):
    """A balancer's counters for each backend."""

    balancer: Text
    revision: Annotated[Text, Meta(description="of the snapshot that its rules follow")]
    interval: Annotated[float, Meta(ge=0.1, le=3600, description="seconds between two reports")]
    backends: Annotated[list[BackendRow], Meta(max_length=MAX_BACKENDS)]
    warnings: Annotated[list[Text], Meta(max_length=MAX_WARNINGS)] = []
    uptime: Annotated[Seconds | None, Meta(description="the balancer's own clock")] = None
    panic: Annotated[bool, Meta(description="fewer than half of the backends are healthy, so all get traffic")] = False
    findings: Annotated[list[FindingRow], Meta(max_length=MAX_FINDINGS)] = []

    def report(self) -> Report:
        samples: dict[str, Sample] = {row.ip: row.sample() for row in self.backends}
        findings = tuple(Finding(row.kind, row.detail or "") for row in self.findings)
        identity = self.balancer, self.revision, self.interval
        return Report(*identity, samples, tuple(self.warnings), self.uptime, self.panic, findings)


class ReportAnswer(Struct):
    """The scaling decision after a report."""

    decision: str
    desired: int
    reason: str


class StopRequest(Struct):
    """The drain of a backend is over."""

    ip: Text
    reason: Text
    id: Text | None = None  # of its container, because the address may be another backend's by now


class DrainRequest(Struct):
    """The backend to take out of rotation and to replace."""

    ip: Text


class ScaleRequest(Struct, forbid_unknown_fields=True):
    """Limits of the fleet that replace those in force; at least one of them."""

    min: BackendLimit | None = None
    max: BackendLimit | None = None
    target: Annotated[float, Meta(ge=0.001, le=1e9)] | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None and self.target is None:
            raise ValueError("at least one of `min`, `max` and `target` is required")


class ScaleAnswer(Struct):
    """The limits in force."""

    min: int
    max: int
    target: float
    desired: int


class PauseAnswer(Struct):
    """Whether decisions are only recorded and not carried out."""

    paused: bool


class SyncQuery(Struct):
    have: Annotated[str, Meta(description="the revision that the caller has")] = ""
    wait: Annotated[float, Meta(ge=0, le=LONGEST_WAIT, description="seconds to wait for another revision")] = 0


class HistoryQuery(Struct):
    since: Annotated[Seconds, Meta(description="seconds since 1970; only newer entries are returned")] = 0


class SharesQuery(Struct):
    name: Annotated[str, Meta(description="name of a backend")] = ""


# Texts, which are read like the settings of run.sh, so that both have the same limits and refusals.
SettingText = Annotated[str, Meta(max_length=30)]


class WhatIfQuery(Struct, forbid_unknown_fields=True):
    """Settings to replay with; the others are those in force."""

    target: Annotated[SettingText | None, Meta(description="as --target of run.sh")] = None
    stable_window: Annotated[SettingText | None, Meta(description="as --stable-window of run.sh")] = None
    panic_window: Annotated[SettingText | None, Meta(description="as --panic-window of run.sh")] = None


class LogQuery(Struct):
    lines: Annotated[int, Meta(ge=1, le=500, description="how many of the newest records")] = 100


class LogRecord(Struct):
    """One record of the manager's log since its start."""

    time: Annotated[float, Meta(description="seconds since 1970")]
    level: str
    text: str


def decode(body: bytes, message: type[T]) -> T:
    """The JSON body as that message. Raises InvalidMessage."""
    try:
        return msgspec.json.decode(body, type=message, dec_hook=_decode_text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # the last one: nested too deep
        raise InvalidMessage(one_line(str(error))[:MAX_TEXT]) from error


def decode_query(arguments: dict[str, str], message: type[T]) -> T:
    """The query's arguments as that message. Raises InvalidMessage."""
    try:
        return msgspec.convert(arguments, message, strict=False, dec_hook=_decode_text)
    except msgspec.ValidationError as error:
        raise InvalidMessage(one_line(str(error))[:MAX_TEXT]) from error


def _decode_text(type_: type, value: Any) -> Text:
    # msgspec calls this for every type that it does not know. Text is the only one here.
    is_valid = type_ is Text and isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
    if not is_valid:
        raise ValueError(f"Expected text of 1 to {MAX_TEXT} printable characters")
    return Text(value)


def one_line(text: str) -> str:
    """The text with a ? for each character that is not printable. It may quote what a caller or a backend wrote."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
