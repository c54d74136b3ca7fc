"""Reads and changes this network namespace's tables, sets, flows and neighbours: the only module that does.

iptables, ipset and ip are run with argument lists, never by a shell. Flows are read and deleted by `ctnetlink`. Every
failure is a NetfilterError.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import ctnetlink
import flows
from features import Feature
from flows import FlowCounts, Timeouts
from listings import Listing, parse_set, parse_table
from ruleset import REPLIES, SET

LOCKED, TRIES = 4, 5  # the exit code when another program holds the lock, the only failure that is tried again
TIMEOUT = 30  # seconds
MAX_FILTERED_SCANS = 8  # at a million flows each takes 0.4 s, and one scan of all flows four seconds
PROC = Path("/proc/sys/net")


class NetfilterError(Exception):
    """A tool or the kernel refused. The message has the command, the cause and, for a restore, the numbered lines."""


def run(argv: Sequence[str], text: str = "") -> str:
    """Runs `argv` with `text` as standard input, and returns its standard output."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(0.05 * 2**attempt)
        try:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise NetfilterError(f"{' '.join(argv)}: not finished after {TIMEOUT} s") from None
        if done.returncode == 0:
            return done.stdout
        if done.returncode != LOCKED:
            break
    # The program names a faulty line only by its number, so print the lines with their numbers.
    numbered = "".join(f"\n{number:5} {line}" for number, line in enumerate(text.splitlines(), 1))
    raise NetfilterError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}{numbered}")


class Netfilter:
    """Tables by the `nft` or the `legacy` flavour of iptables."""

    def __init__(self, flavour: str) -> None:
        self._restore = f"iptables-{flavour}-restore"
        self._save = f"iptables-{flavour}-save"

    # -- tables and sets -------------------------------------------------------------------------------------------

    def missing(self, features: Iterable[Feature]) -> tuple[Feature, ...]:
        """Those of `features` that this kernel lacks."""
        return tuple(feature for feature in features if not self._has(feature))

    def _has(self, feature: Feature) -> bool:
        """Tries the feature's rule in a chain that the same restore removes."""
        chain = f":LB-TRY - [0:0]\n-A LB-TRY {feature.rule}\n-F LB-TRY\n-X LB-TRY\n"
        try:
            self.apply(f"*{feature.table}\n{chain}COMMIT\n")
        except NetfilterError:
            return False
        return True

    def table(self, name: str) -> str:
        """The text of one table, with counters."""
        return run([self._save, "-c", "-t", name])

    def listing(self, name: str) -> Listing:
        return parse_table(self.table(name))

    def apply(self, text: str) -> None:
        if text:
            run([self._restore, "--noflush", "-w", "5"], text)

    def make_sets(self) -> None:
        """Creates the sets that do not exist yet."""
        for name in (SET, REPLIES):
            run(["ipset", "create", name, "hash:ip", "family", "inet", "counters", "-exist"])

    def sets(self) -> str:
        """The text of all sets."""
        return run(["ipset", "save"])

    def members(self) -> dict[str, dict[str, tuple[int, int]]]:
        """For each of the two sets, by name: (packets, bytes) of each member, by address."""
        text = self.sets()
        return {name: parse_set(text, name) for name in (SET, REPLIES)}

    def change_sets(self, text: str) -> None:
        if text:
            run(["ipset", "restore", "-exist"], text)

    # -- flows and neighbours --------------------------------------------------------------------------------------

    def all_flows(self, check_source: str = "") -> FlowCounts:
        """Counts every flow of the service, without self-check connections from `check_source`."""
        return self._count([flows.listing_request()], check_source)

    def waiting_flows(self, check_source: str = "") -> FlowCounts:
        """Counts the flows that wait for a first reply; the kernel selects them."""
        return self._count([flows.listing_request(waiting_only=True)], check_source)

    def flows_of(self, ips: Collection[str]) -> FlowCounts:
        """Counts the flows of some backends. The result may also contain other backends."""
        return self._count(_requests_for(ips))

    def _count(self, requests: Iterable[bytes], check_source: str = "") -> FlowCounts:
        timeouts = self._timeouts()
        with _connection_table():
            return flows.count(_flows(requests), timeouts, check_source)

    def delete_flows(self, ips: Collection[str], unanswered_only: bool = False) -> None:
        """Deletes the flows of any number of backends; `unanswered_only`: those whose SYN got no answer."""
        if ips:
            with _connection_table():
                ctnetlink.delete(_deletions(ips, unanswered_only))

    def delete_neighbours(self, ips: Collection[str]) -> None:
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


@contextlib.contextmanager
def _connection_table() -> Iterator[None]:
    """Turns an OSError of ctnetlink into a NetfilterError."""
    try:
        yield
    except OSError as error:
        raise NetfilterError(f"connection table: {error}") from error


def _requests_for(ips: Collection[str]) -> list[bytes]:
    """For a few backends one filtered scan each; for many, one scan of all flows."""
    if len(ips) <= MAX_FILTERED_SCANS:
        return [flows.listing_request(backend=ip) for ip in ips]
    return [flows.listing_request()]


def _flows(requests: Iterable[bytes]) -> Iterator[flows.Flow]:
    for request in requests:
        for block in ctnetlink.listing(request):
            yield from flows.flows(block)


def _deletions(ips: Collection[str], unanswered_only: bool) -> Iterator[bytes]:
    for request in _requests_for(ips):
        for block in ctnetlink.listing(request):
            yield from flows.deletions(block, ips, unanswered_only)


def _setting(path: str) -> int:
    return int((PROC / path).read_text())
