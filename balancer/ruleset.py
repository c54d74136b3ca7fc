"""Renders backends and weights as `iptables-restore` text. Pure: runs nothing, reads nothing.

The path of a new connection through the nat table (all chains of this project begin with LB-):

    PREROUTING ─▶ LB-DISPATCH ─▶ (LB-T-… inner chains of the tree) ─▶ LB-B-<ip>: DNAT ─▶ POSTROUTING ─▶ LB-MASQ

Guarantees:
- A text holds one table and changes only chains that differ from the listing it was made for. Applied with
  `--noflush` it is atomic, and foreign chains stay as they are.
- A backend's chain is written once. So the counter of its one rule, which counts connections because the nat table sees
  first packets only, grows for as long as the backend is known, however often the dispatch chains are rewritten.
- Shares are exact: rule i of a chain has probability w_i / (w_i + … + w_n), and the last rule has none.
- Rules have the form that `iptables-save` prints, so a comparison of strings finds every change by another program.
- The project's rules stand first in every built-in chain. Only Docker's rules for its DNS may stand before them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from features import MARKS, NOTRACK, RETRIES, Feature
from listings import Listing

SERVICE_PORT = 8000
PREFIX = "LB-"
DISPATCH, MASQUERADE, INPUT, FORWARD, COUNT = "LB-DISPATCH", "LB-MASQ", "LB-INPUT", "LB-FORWARD", "LB-COUNT"
FIRST, CHECK, OWN_IN, OWN_OUT = "LB-FIRST", "LB-CHECK", "LB-OWN-IN", "LB-OWN-OUT"
SET, REPLIES = "LB-BACKENDS", "LB-REPLIES"  # packets and bytes to a backend; its connections with a first reply
LEAF, DIGIT_BITS = 8, 2  # a chain dispatches to at most LEAF backends; with more, it branches on one base-4 digit

# Bits of a connection's mark: the client has sent data, the backend has sent data. Other bits are left as they are.
REQUEST_MARK, REPLY_MARK = 0x20000000, 0x40000000
# Source ports of the balancer's own connections (run.sh sets ip_local_port_range), and those for masquerading.
OWN_PORTS, MASQUERADE_PORTS = "60000:65535", "1024-59999"
CHECK_PORTS = 61000, 61063  # source ports of the manager's self-check connections
MAX_CHECKED = 8  # backends that self-check connections are spread over

Rules = tuple[str, ...]
Chains = dict[str, Rules]


@dataclass(frozen=True)
class Endpoint:
    """Where a backend listens, and its weight: any number > 0; only ratios matter."""

    ip: str
    port: int
    weight: float = 1.0


@dataclass(frozen=True)
class Table:
    """The wanted content of one table: the project's chains, and the rules that lead from built-in chains into them."""

    name: str
    chains: Chains
    hooks: Mapping[str, Rules]


def backend_chain(ip: str) -> str:
    return f"LB-B-{ip}"


def tables(
    rotation: Sequence[Endpoint],
    draining: Iterable[Endpoint] = (),
    backend_subnet: str = "",
    check_source: str = "",
    missing: Collection[Feature] = (),
) -> list[Table]:
    """All tables, in the order in which they have to be written. `missing` are features that this kernel lacks; the
    functions below explain the other arguments."""
    wanted = [
        nat(rotation, draining, backend_subnet, check_source),
        filters(rotation, RETRIES not in missing),
        mangle(check_source, MARKS not in missing),
    ]
    return wanted if NOTRACK in missing else [*wanted, raw()]


def nat(
    rotation: Sequence[Endpoint], draining: Iterable[Endpoint] = (), backend_subnet: str = "", check_source: str = ""
) -> Table:
    """Dispatches new connections over `rotation`. `draining` backends keep their chain, and so their counter.

    Clients are masqueraded, so that answers come back through the balancer. With `backend_subnet`, only clients of that
    network are: the backends then have their default route through the balancer.
    Self-check connections from `check_source` have rules of their own, so that they do not count as load.
    """
    chains = dispatch(rotation)
    # The chain of each known backend.
    for backend in sorted({*rotation, *draining}, key=_address):
        chains[backend_chain(backend.ip)] = (f"-p tcp -j {_dnat(backend)}",)
    # Masquerade only connections to the service: Docker's DNS has its own DNAT in this table.
    dispatched = f"-p tcp -m conntrack --ctstate DNAT --ctorigdstport {SERVICE_PORT}"
    source = f"-s {backend_subnet} " if backend_subnet else ""
    chains[MASQUERADE] = (f"{source}{dispatched} -j MASQUERADE --to-ports {MASQUERADE_PORTS} --random-fully",)
    # From PREROUTING into dispatch, and first self-checks into their own chain.
    entry = [f"-p tcp -m tcp --dport {SERVICE_PORT} -m addrtype --dst-type LOCAL -j {DISPATCH}"]
    if check_source:
        # Equal shares over a few backends. Not through their own chains, which count connections.
        checked = sorted(rotation, key=_address)[:MAX_CHECKED]
        chains[CHECK] = _choice([(_dnat(backend), 1.0) for backend in checked], match="-p tcp ")
        ports = f"--sport {CHECK_PORTS[0]}:{CHECK_PORTS[1]} --dport {SERVICE_PORT}"
        entry.insert(0, f"-s {check_source}/32 -p tcp -m tcp {ports} -m addrtype --dst-type LOCAL -j {CHECK}")
    return Table("nat", chains, {"PREROUTING": tuple(entry), "POSTROUTING": (f"-j {MASQUERADE}",)})


def _dnat(backend: Endpoint) -> str:
    return f"DNAT --to-destination {backend.ip}:{backend.port}"


def mangle(check_source: str = "", marks: bool = True) -> Table:
    """Counts packets and bytes to every backend with one rule: the set keeps a counter for each member.

    With `marks`, the first packet with data of each side marks the connection, and the backend's first one is counted
    in a set of its own. Packets without PSH, or after the first reply, pass only one more rule.
    """
    chains: Chains = {COUNT: (f"-m set --match-set {SET} dst",)}
    if marks:
        no_reply_yet = f"-m connmark --mark 0x0/{REPLY_MARK:#x}"
        chains[COUNT] += (f"-p tcp -m tcp --tcp-flags PSH PSH {no_reply_yet} -j {FIRST}",)
        request, reply = "-m conntrack --ctdir ORIGINAL", "-m conntrack --ctdir REPLY"
        chains[FIRST] = (
            f"{request} -m set --match-set {SET} dst ! --update-counters {_set_mark(REQUEST_MARK)}",
            f"{reply} -m set --match-set {REPLIES} src",
            f"{reply} -m set --match-set {SET} src ! --update-counters {_set_mark(REPLY_MARK)}",
        )
    if check_source:  # before the counting rules
        ports = f"{CHECK_PORTS[0]}:{CHECK_PORTS[1]}"
        is_check = f"-p tcp -m conntrack --ctorigsrc {check_source} --ctorigsrcport {ports}"
        chains[COUNT] = (f"{is_check} -j RETURN", *chains[COUNT])
    return Table("mangle", chains, {"FORWARD": (f"-j {COUNT}",)})


def _set_mark(bit: int) -> str:
    return f"-j CONNMARK --set-xmark {bit:#x}/{bit:#x}"


def raw() -> Table:
    """Keeps the balancer's own connections (probes, reports, long polls) out of the connection table, so that they work
    when it is full. Loopback is left alone: Docker's DNS is translated there."""
    inbound = f"! -i lo -p tcp -m tcp --dport {OWN_PORTS} -m addrtype --dst-type LOCAL -j CT --notrack"
    outbound = f"! -o lo -p tcp -m tcp --sport {OWN_PORTS} -j CT --notrack"
    hooks = {"PREROUTING": (f"-j {OWN_IN}",), "OUTPUT": (f"-j {OWN_OUT}",)}
    return Table("raw", {OWN_IN: (inbound,), OWN_OUT: (outbound,)}, hooks)


def filters(rotation: Sequence[Endpoint], retries: bool = True) -> Table:
    """Makes a client's kernel try a failed connection again.

    A SYN that reaches the balancer itself was not dispatched, because no backend was ready. It is dropped: the client
    sends it again a second later. A RST that is a backend's first packet is a refusal. With `retries` it is dropped
    while rotation has another backend: conntrack has closed the flow, so the client's next SYN is dispatched again.
    """
    undispatched = f"-p tcp -m tcp --dport {SERVICE_PORT} --tcp-flags FIN,SYN,RST,ACK SYN -j DROP"
    first_packet = "-m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply"
    refusal = f"-p tcp -m tcp --tcp-flags RST RST -m set --match-set {SET} src {first_packet} -j DROP"
    chains: Chains = {INPUT: (undispatched,), FORWARD: (refusal,) if retries and len(rotation) > 1 else ()}
    return Table("filter", chains, {"INPUT": (f"-j {INPUT}",), "FORWARD": (f"-j {FORWARD}",)})


def dispatch(rotation: Sequence[Endpoint]) -> Chains:
    """LB-DISPATCH and, above LEAF backends, the tree below it: a new connection passes O(log n) rules.

    The tree is a trie over the address's base-4 digits, least significant first. Docker assigns consecutive addresses,
    so it is balanced. A backend that is added, removed or gets another weight changes only the chains on its own path.
    """
    chains: Chains = {}

    def grow(chain: str, members: list[Endpoint], path: str) -> None:
        if len(members) <= LEAF:
            chains[chain] = _choice([(backend_chain(member.ip), member.weight) for member in members])
            return
        groups: dict[str, list[Endpoint]] = {}
        while len(groups) < 2:  # skip digits that all members share
            digit, groups = len(path), {}
            for member in members:
                groups.setdefault(_digit(member, digit), []).append(member)
            path += next(iter(groups))
        # One child chain for each value of the digit, with the sum of its members' weights. The loop has put a value of
        # this digit at the end of the path; each child has its own value there.
        targets = []
        for value, group in sorted(groups.items()):
            child = f"LB-T-{path[:-1]}{value}"
            targets.append((child, sum(member.weight for member in group)))
            grow(child, group, path[:-1] + value)
        chains[chain] = _choice(targets)

    grow(DISPATCH, sorted(rotation, key=_address), "")
    return chains


def _choice(targets: Sequence[tuple[str, float]], match: str = "") -> Rules:
    """One rule for each (target, weight). A packet at rule i matches with probability w_i / (w_i + … + w_n)."""
    rules = []
    for i, (target, weight) in enumerate(targets):
        if i == len(targets) - 1:
            # No probability: a guaranteed match, in spite of the others' rounding.
            rules.append(f"{match}-j {target}")
        else:
            # Only packets that no earlier rule matched get here, so the chance is a part of the remaining weight.
            chance = _probability(weight / sum(weight for _, weight in targets[i:]))
            rules.append(f"{match}-m statistic --mode random --probability {chance} -j {target}")
    return tuple(rules)


def _probability(p: float) -> str:
    """`p` rounded to a multiple of 2^-31, as the kernel stores it, and written as `iptables-save` prints it."""
    return f"{round(p * 2**31) / 2**31:.11f}"


def restore(table: Table, actual: Listing) -> str:
    """The text that changes `actual` into `table` in one atomic step; empty if they are equal."""
    changed = [chain for chain, rules in table.chains.items() if actual.chains.get(chain) != rules]
    stale = [chain for chain in actual.chains if chain.startswith(PREFIX) and chain not in table.chains]
    hooks: list[str] = []
    for chain, rules in table.hooks.items():
        hooks += _hook_changes(chain, rules, actual.chains.get(chain, ()))
    if not (changed or stale or hooks):
        return ""
    lines = [f"*{table.name}"]
    # With --noflush, this line creates the chain, or empties it if it exists.
    for chain in (*changed, *stale):
        lines.append(f":{chain} - [0:0]")
    for chain in changed:
        for rule in table.chains[chain]:
            lines.append(f"-A {chain} {rule}")
    lines += hooks
    # Last, because a chain can be deleted only when no rule leads to it.
    for chain in stale:
        lines.append(f"-X {chain}")
    return "\n".join([*lines, "COMMIT", ""])


def _hook_changes(chain: str, wanted: Rules, actual: Rules) -> list[str]:
    """The deletions and insertions that put `wanted` first in a built-in chain; empty when it is in place."""
    without_docker = tuple(rule for rule in actual if not is_dockers(rule))
    ours = [rule for rule in actual if is_ours(rule)]
    if without_docker[: len(wanted)] == wanted and len(ours) == len(wanted):
        return []
    # Also deletes duplicates, and hooks of an earlier version.
    deletes = [f"-D {chain} {rule}" for rule in ours]
    return deletes + [f"-I {chain} {place} {rule}" for place, rule in enumerate(wanted, 1)]


def is_hooked(nat: Listing) -> bool:
    """Whether a rule in PREROUTING leads new connections to dispatch."""
    return DISPATCH in nat.chains and any(target_of(rule) == DISPATCH for rule in nat.chains.get("PREROUTING", ()))


def is_ours(rule: str) -> bool:
    return target_of(rule).startswith(PREFIX)


def is_dockers(rule: str) -> bool:
    """Whether Docker wrote the rule: it keeps some in a container's nat table, for its DNS."""
    return target_of(rule).startswith("DOCKER_")


def target_of(rule: str) -> str:
    """The rule's target; empty for a rule that only counts."""
    match = re.search(r"(?:^| )-[jg] (\S+)", rule)
    return match[1] if match else ""


def set_changes(wanted: Iterable[str], present: Iterable[str], name: str = SET) -> str:
    """`ipset restore` text. Adds no present member again, which would zero its counters."""
    wanted, present, lines = set(wanted), set(present), ""
    for ip in sorted(wanted - present):
        lines += f"add {name} {ip}\n"
    for ip in sorted(present - wanted):
        lines += f"del {name} {ip}\n"
    return lines


def _address(endpoint: Endpoint) -> int:
    return int(IPv4Address(endpoint.ip))


def _digit(endpoint: Endpoint, place: int) -> str:
    return str(_address(endpoint) >> (DIGIT_BITS * place) & (2**DIGIT_BITS - 1))
