"""Reads and changes this network namespace's tables, sets, flows and neighbours: the only module that does.

iptables, ipset and ip are run with argument lists, never by a shell. Flows are read and deleted by `ctnetlink`. Every
failure is a NetfilterError.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import ctnetlink
import flows
from datapath import OWN_NAMESPACE, DataPath
from features import Feature
from flows import FlowCounts, Timeouts
from listings import Listing, parse_set, parse_table

LOCKED, TRIES = 4, 5  # the exit code when another program holds the lock, the only failure that is tried again
TIMEOUT = 30  # seconds
MAX_FILTERED_SCANS = 8  # at a million flows each takes 0.4 s, and one scan of all flows four seconds
PROC = Path("/proc/sys/net")
# The rules give each entry its timeout; this one only makes timeouts possible.
CLIENTS_OPTIONS = "hash:ip family inet maxelem 1048576 timeout 3600"


class NetfilterError(Exception):
    """A tool or the kernel refused. The message has the command, the cause and, for a restore, the numbered lines."""


def run(argv: Sequence[str], text: str = "") -> str:
    """Runs `argv` with `text` as standard input, and returns its standard output."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(0.05 * 2**attempt)
        try:
            # `errors` makes it text, also where a comment in another program's rule is no UTF-8.
            done = subprocess.run(argv, input=text, capture_output=True, errors="replace", timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise NetfilterError(f"{' '.join(argv)}: not finished after {TIMEOUT} s") from None
        except OSError as error:
            raise NetfilterError(f"{argv[0]} cannot be run: {error}") from error
        if done.returncode == 0:
            return done.stdout
        if done.returncode != LOCKED:
            break
    # The program names a faulty line only by its number, so print the lines with their numbers.
    numbered = "".join(f"\n{number:5} {line}" for number, line in enumerate(text.splitlines(), 1))
    raise NetfilterError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}{numbered}")


class Netfilter:
    """Tables by the `nft` or the `legacy` flavour of iptables; sets and flows of the service on `path`."""

    def __init__(self, flavour: str, path: DataPath = OWN_NAMESPACE) -> None:
        self.path = path
        self._restore = f"iptables-{flavour}-restore"
        self._save = f"iptables-{flavour}-save"

    # -- tables and sets -------------------------------------------------------------------------------------------

    def missing(self, features: Iterable[Feature]) -> tuple[Feature, ...]:
        """Those of `features` that this kernel lacks."""
        return tuple(feature for feature in features if not self._has(feature))

    def _has(self, feature: Feature) -> bool:
        """Tries the feature's rule in a chain that the same restore removes."""
        chain = self.path.chain("TRY")
        lines = f":{chain} - [0:0]\n-A {chain} {feature.rule}\n-F {chain}\n-X {chain}\n"
        try:
            self.apply(f"*{feature.table}\n{lines}COMMIT\n")
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
        """Creates the two sets of backends, unless they exist."""
        for name in self.path.backend_sets:
            run(["ipset", "create", name, "hash:ip", "family", "inet", "counters", "-exist"])

    def set_names(self) -> list[str]:
        """The names of the project's sets."""
        return [name for name in run(["ipset", "list", "-name"]).split() if name.startswith(self.path.prefix)]

    def members(self, name: str) -> dict[str, tuple[int, int]]:
        """(packets, bytes) of each member of a set, by address."""
        return parse_set(run(["ipset", "save", name]), name)

    def make_client_sets(self, ips: Iterable[str]) -> None:
        """Creates the sets of the clients that keep a backend: one for each backend and one for all clients."""
        if self.path.sticky:
            names = [self.path.clients_set, *(self.path.sticky_set(ip) for ip in ips)]
            run(["ipset", "restore", "-exist"], "".join(f"create {name} {CLIENTS_OPTIONS}\n" for name in names))

    def remove_client_sets(self, kept: Iterable[str]) -> None:
        """Removes the sets of backends that are not `kept`. The kernel may still use one for a moment after its last
        rule is gone; the next pass removes it."""
        wanted = {self.path.sticky_set(ip) for ip in kept}
        for name in self.set_names() if self.path.sticky else ():
            if name.startswith(self.path.sticky_set("")) and name not in wanted:
                with contextlib.suppress(NetfilterError):
                    run(["ipset", "destroy", name])

    def change_sets(self, text: str) -> None:
        if text:
            run(["ipset", "restore", "-exist"], text)

    # -- flows and neighbours --------------------------------------------------------------------------------------

    def all_flows(self, check_source: str = "") -> FlowCounts:
        """Counts every flow of the service, without self-check connections from `check_source`."""
        return self._count([flows.listing_request(self.path.service_ports)], check_source)

    def waiting_flows(self, check_source: str = "") -> FlowCounts:
        """Counts the flows that wait for a first reply; the kernel selects them."""
        return self._count([flows.listing_request(self.path.service_ports, waiting_only=True)], check_source)

    def flows_of(self, ips: Collection[str]) -> FlowCounts:
        """Counts the flows of some backends. The result may also contain other backends."""
        return self._count(self._requests_for(ips))

    def _count(self, requests: Iterable[bytes], check_source: str = "") -> FlowCounts:
        timeouts = self._timeouts()
        with _connection_table():
            return flows.count(self._flows(requests), timeouts, check_source)

    def delete_flows(self, ips: Collection[str], unanswered_only: bool = False) -> None:
        """Deletes the flows of any number of backends; `unanswered_only`: those whose SYN got no answer."""
        if ips:
            self._delete(self._requests_for(ips), flows.of_backends(ips, unanswered_only))

    def delete_misdirected_flows(self, ips: Collection[str]) -> None:
        """Deletes the flows to the service that another program's rule sent elsewhere than to these backends, and that
        nobody answers."""
        self._delete([flows.listing_request(self.path.service_ports)], flows.misdirected(ips))

    def _requests_for(self, ips: Collection[str]) -> list[bytes]:
        """For a few backends one filtered scan each; for many, one scan of all flows."""
        if len(ips) <= MAX_FILTERED_SCANS:
            return [flows.listing_request(self.path.service_ports, backend=ip) for ip in ips]
        return [flows.listing_request(self.path.service_ports)]

    def _flows(self, requests: Iterable[bytes]) -> Iterator[flows.Flow]:
        for request in requests:
            for block in ctnetlink.listing(request):
                yield from flows.flows(block, self.path.service_ports)

    def _delete(self, requests: Iterable[bytes], chosen: Callable[[flows.Flow], bool]) -> None:
        with _connection_table():
            ctnetlink.delete(self._deletions(requests, chosen))

    def _deletions(self, requests: Iterable[bytes], chosen: Callable[[flows.Flow], bool]) -> Iterator[bytes]:
        for request in requests:
            for block in ctnetlink.listing(request):
                yield from flows.deletions(block, self.path.service_ports, chosen)

    def delete_neighbours(self, ips: Collection[str]) -> None:
        if ips:
            run(["ip", "-batch", "-"], "".join(f"neigh flush to {ip}\n" for ip in ips))

    def enable_hairpin(self) -> None:
        """Lets each port of the backends' bridge send frames back to where they came from. With bridge netfilter, the
        call of a backend to the service that is dispatched to the same backend takes that way."""
        ports = json.loads(run(["ip", "-json", "link", "show", "master", self.path.bridge]) or "[]")
        changes = ""
        for port in ports:
            changes += f"link set dev {port['ifname']} type bridge_slave hairpin on\n"
        # A port may disappear meanwhile: -force continues with the next one.
        with contextlib.suppress(NetfilterError):
            run(["ip", "-force", "-batch", "-"], changes)

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
    """Turns an OSError of ctnetlink, and a malformed listing, into a NetfilterError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise NetfilterError(f"connection table: {error}") from error


def _setting(path: str) -> int:
    try:
        return int((PROC / path).read_text())
    except (OSError, ValueError) as error:
        raise NetfilterError(f"{PROC / path} cannot be read: {error}") from error
