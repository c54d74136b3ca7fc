"""Reads and changes this network namespace's tables, sets, flows and neighbours: the only place that does.

iptables, ipset and ip are run with argument lists, never by a shell; flows go through `ctnetlink`. A tool that fails
raises NetfilterError with what it printed and, for a restore, the numbered lines it was given; only a lock held by
another program (exit code 4) is tried again.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import ctnetlink
import flows
from flows import FlowCounts, Timeouts
from ruleset import REPLIES, SET, Features

LOCKED, TRIES = 4, 5
TIMEOUT = 30  # seconds


class NetfilterError(Exception):
    """A tool or the kernel refused; the message says which, why, and what it was given."""


def run(argv: Sequence[str], text: str = "", accept: Sequence[int] = (0,)) -> str:
    """The standard output of `argv` fed with `text`. Exit codes in `accept` are fine, any other raises."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(0.05 * 2**attempt)
        try:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise NetfilterError(f"{' '.join(argv)}: no end after {TIMEOUT} s") from None
        if done.returncode in accept:
            return done.stdout
        if done.returncode != LOCKED:
            break
    numbered = "".join(f"\n{number:5} {line}" for number, line in enumerate(text.splitlines(), 1))
    raise NetfilterError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}{numbered}")


MAX_FILTERED_SCANS = 8  # at a million flows 0.4 s each, where one scan of all takes four seconds
PROC = Path("/proc/sys/net")
# One rule for each feature that we can do without.
MARKS_RULE = "-m connmark --mark 0x0/0x40000000 -j CONNMARK --set-xmark 0x40000000/0x40000000"
RETRIES_RULE = "-p tcp -m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply -j DROP"
NOTRACK_RULE = "-p tcp -j CT --notrack"


class Netfilter:
    """Tables by the `nft` or the `legacy` flavour of iptables."""

    def __init__(self, flavour: str) -> None:
        self._restore = f"iptables-{flavour}-restore"
        self._save = f"iptables-{flavour}-save"

    # -- tables and sets -------------------------------------------------------------------------------------------

    def features(self) -> Features:
        """Tries what not every kernel has, in a chain that is gone at once."""
        return Features(
            marks=self._takes("mangle", MARKS_RULE),
            retries=self._takes("filter", RETRIES_RULE),
            notrack=self._takes("raw", NOTRACK_RULE),
        )

    def _takes(self, table: str, rule: str) -> bool:
        try:
            self.apply(f"*{table}\n:LB-TRY - [0:0]\n-A LB-TRY {rule}\n-F LB-TRY\n-X LB-TRY\nCOMMIT\n")
        except NetfilterError:
            return False
        return True

    def table(self, name: str) -> str:
        return run([self._save, "-c", "-t", name])

    def apply(self, text: str) -> None:
        if text:
            run([self._restore, "--noflush", "-w", "5"], text)

    def make_sets(self) -> None:
        """Makes both sets, where they are not there."""
        for name in (SET, REPLIES):
            run(["ipset", "create", name, "hash:ip", "family", "inet", "counters", "-exist"])

    def sets(self) -> str:
        """The listing of all sets."""
        return run(["ipset", "save"])

    def change_sets(self, text: str) -> None:
        if text:
            run(["ipset", "restore", "-exist"], text)

    # -- flows and neighbours --------------------------------------------------------------------------------------

    def all_flows(self, check_source: str = "") -> FlowCounts:
        """Counts every flow of the service, but for self-check connections from `check_source`."""
        return self._count(flows.listing_request(), check_source=check_source)

    def waiting_flows(self, check_source: str = "") -> FlowCounts:
        """Counts those that wait for a first reply; the kernel picks them out."""
        return self._count(flows.listing_request(waiting_only=True), check_source=check_source)

    def flows_of(self, ips: Collection[str]) -> FlowCounts:
        """Counts the flows of some backends; others' may be counted, too."""
        return self._count(*_requests_for(ips))

    def _count(self, *requests: bytes, check_source: str = "") -> FlowCounts:
        timeouts = self._timeouts()
        seen = (flow for block in _listings(requests) for flow in flows.flows(block))
        return flows.count(seen, timeouts, check_source)

    def forget_flows(self, ips: Collection[str], unanswered_only: bool = False) -> None:
        """Deletes the flows of any number of backends."""
        if not ips:
            return
        blocks = _listings(_requests_for(ips))
        deletions = (deletion for block in blocks for deletion in flows.deletions(block, ips, unanswered_only))
        try:
            ctnetlink.delete(deletions)
        except (ctnetlink.ConntrackError, OSError) as error:
            raise NetfilterError(f"connection table: {error}") from error

    def forget_neighbours(self, ips: Collection[str]) -> None:
        if ips:
            run(["ip", "-batch", "-"], "".join(f"neigh flush to {ip}\n" for ip in ips))

    # -- settings --------------------------------------------------------------------------------------------------

    def conntrack_use(self) -> tuple[int, int]:
        """(entries in the connection table, how many it can hold)."""
        return _setting("netfilter/nf_conntrack_count"), _setting("netfilter/nf_conntrack_max")

    def ip_forward(self) -> bool:
        return bool(_setting("ipv4/ip_forward"))

    def _timeouts(self) -> Timeouts:
        prefix = "netfilter/nf_conntrack_tcp_timeout_"
        by_state = {state: _setting(prefix + name) for state, name in enumerate(flows.STATE_NAMES, 1)}
        return Timeouts(by_state, _setting(prefix + "unacknowledged"))


def _requests_for(ips: Collection[str]) -> list[bytes]:
    """Of few backends the kernel picks out the flows, one scan each; those of many are found in one scan of all."""
    if len(ips) <= MAX_FILTERED_SCANS:
        return [flows.listing_request(backend=ip) for ip in ips]
    return [flows.listing_request()]


def _listings(requests: Iterable[bytes]) -> Iterator[bytes]:
    try:
        for request in requests:
            yield from ctnetlink.listing(request)
    except (ctnetlink.ConntrackError, OSError) as error:
        raise NetfilterError(f"connection table: {error}") from error


def _setting(path: str) -> int:
    return int((PROC / path).read_text())
