"""Backends and weights in, `iptables-restore` text out. Pure: runs nothing, reads nothing.

The path of a new connection, nat table (every chain of ours begins with LB-):

    PREROUTING ─▶ LB-DISPATCH ─▶ (LB-T-… inner chains of the tree) ─▶ LB-B-<ip>: DNAT ─▶ POSTROUTING ─▶ LB-MASQ

Promises:
- A text holds one table and changes only chains that differ from the listing it was made for; applied with
  `--noflush` it is atomic, and no chain that is not ours is touched.
- A backend's chain is written once, so the counter of its one rule (connections: nat sees first packets only) grows
  for as long as the backend is known, whatever happens to the dispatch above it.
- Shares are exact: rule i of a chain has probability w_i / (w_i + … + w_n) and the last has none.
- Rules are spelled as `iptables-save` prints them, so "is it still what we wrote?" is a comparison of strings.
- Our rules stand first in every built-in chain they are in (only Docker's own, for its DNS, may stand before them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from listings import Listing

SERVICE_PORT = 8000
PREFIX = "LB-"
DISPATCH, MASQUERADE, INPUT, FORWARD, COUNT = "LB-DISPATCH", "LB-MASQ", "LB-INPUT", "LB-FORWARD", "LB-COUNT"
FIRST, CHECK, OWN_IN, OWN_OUT = "LB-FIRST", "LB-CHECK", "LB-OWN-IN", "LB-OWN-OUT"
SET, REPLIES = "LB-BACKENDS", "LB-REPLIES"  # packets and bytes towards a backend; its connections with a first reply
LEAF, DIGIT_BITS = 8, 2  # a chain dispatches to at most LEAF targets; past that it splits by one base-4 digit

# Bits of a connection's mark: the client has sent data, the backend has sent data. Other bits are left as they are.
REQUEST_MARK, REPLY_MARK = 0x20000000, 0x40000000
# Source ports of the balancer's own connections (run.sh sets ip_local_port_range), and those left to masquerading.
OWN_PORTS, MASQUERADE_PORTS = "60000:65535", "1024-59999"
CHECK_PORTS = 61000, 61063  # source ports of the manager's self-check connections
MAX_CHECKED = 8  # backends that self-check connections are spread over

Rules = tuple[str, ...]
Chains = dict[str, Rules]


@dataclass(frozen=True)
class Endpoint:
    """Where a backend listens, and its weight: any number ≥ 0; only ratios matter."""

    ip: str
    port: int
    weight: float = 1.0


@dataclass(frozen=True)
class Table:
    """What we want of one table: our chains, and the rules that lead from each built-in chain into ours, in order."""

    name: str
    chains: Chains
    hooks: Mapping[str, Rules]


@dataclass(frozen=True)
class Features:
    """What this kernel can do beyond what nothing works without."""

    marks: bool = True  # connmark: which connections wait for a first reply
    retries: bool = True  # connbytes: a connection that a backend refuses is sent to another
    notrack: bool = True  # the raw table and CT: the balancer's own connections take no room in the connection table


def backend_chain(ip: str) -> str:
    return f"LB-B-{ip}"


def tables(
    rotation: Sequence[Endpoint],
    draining: Iterable[Endpoint] = (),
    backend_subnet: str = "",
    check_source: str = "",
    features: Features = Features(),
) -> list[Table]:
    """All tables, in the order in which they have to be written. The arguments are those of the functions below."""
    wanted = [
        nat(rotation, draining, backend_subnet, check_source),
        filters(rotation, features.retries),
        mangle(check_source, features.marks),
    ]
    return [*wanted, raw()] if features.notrack else wanted


def nat(
    rotation: Sequence[Endpoint], draining: Iterable[Endpoint] = (), backend_subnet: str = "", check_source: str = ""
) -> Table:
    """Dispatches new connections over `rotation`; `draining` backends keep their chain, and so their counter.

    Clients are hidden behind the balancer's address, so that answers come back to it. With `backend_subnet`, the
    backends' own network, only the clients within it are: the backends then have their default route through us.
    Self-check connections from `check_source` have rules of their own, so that they do not count as load.
    """
    chains = dispatch(rotation)
    for backend in sorted({*rotation, *draining}, key=_address):
        chains[backend_chain(backend.ip)] = (_dnat(backend),)
    ours = f"-p tcp -m conntrack --ctstate DNAT --ctorigdstport {SERVICE_PORT}"  # never Docker's own DNAT, its DNS
    source = f"-s {backend_subnet} " if backend_subnet else ""
    chains[MASQUERADE] = (f"{source}{ours} -j MASQUERADE --to-ports {MASQUERADE_PORTS} --random-fully",)
    entry = [f"-p tcp -m tcp --dport {SERVICE_PORT} -m addrtype --dst-type LOCAL -j {DISPATCH}"]
    if check_source:
        chains[CHECK] = _check_rules(rotation)
        ports = f"--sport {CHECK_PORTS[0]}:{CHECK_PORTS[1]} --dport {SERVICE_PORT}"
        entry.insert(0, f"-s {check_source}/32 -p tcp -m tcp {ports} -m addrtype --dst-type LOCAL -j {CHECK}")
    return Table("nat", chains, {"PREROUTING": tuple(entry), "POSTROUTING": (f"-j {MASQUERADE}",)})


def _dnat(backend: Endpoint, match: str = "") -> str:
    return f"-p tcp {match}-j DNAT --to-destination {backend.ip}:{backend.port}"


def _check_rules(rotation: Sequence[Endpoint]) -> Rules:
    """Equal shares over at most MAX_CHECKED backends."""
    checked = sorted(rotation, key=_address)[:MAX_CHECKED]
    rules = []
    for i, backend in enumerate(checked):
        last = i == len(checked) - 1
        rules.append(_dnat(backend, "" if last else f"{_chance(1 / (len(checked) - i))} "))
    return tuple(rules)


def mangle(check_source: str = "", marks: bool = True) -> Table:
    """Counts packets and bytes towards every backend with one rule: the set keeps a counter for each member.

    With `marks`, the first packet with data of each side marks the connection, and the backend's first one is counted
    in a set of its own. Packets without PSH, and all of a connection that got its first reply, pass one rule for that.
    """
    count = [f"-m set --match-set {SET} dst"]
    if check_source:
        ports = f"{CHECK_PORTS[0]}:{CHECK_PORTS[1]}"
        count.insert(0, f"-p tcp -m conntrack --ctorigsrc {check_source} --ctorigsrcport {ports} -j RETURN")
    chains: Chains = {}
    if marks:
        no_reply_yet = f"-m connmark --mark 0x0/{REPLY_MARK:#x}"
        count.append(f"-p tcp -m tcp --tcp-flags PSH PSH {no_reply_yet} -j {FIRST}")
        request, reply = "-m conntrack --ctdir ORIGINAL", "-m conntrack --ctdir REPLY"
        chains[FIRST] = (
            f"{request} -m set --match-set {SET} dst ! --update-counters {_set_mark(REQUEST_MARK)}",
            f"{reply} -m set --match-set {REPLIES} src",
            f"{reply} -m set --match-set {SET} src ! --update-counters {_set_mark(REPLY_MARK)}",
        )
    return Table("mangle", {COUNT: tuple(count), **chains}, {"FORWARD": (f"-j {COUNT}",)})


def _set_mark(bit: int) -> str:
    return f"-j CONNMARK --set-xmark {bit:#x}/{bit:#x}"


def raw() -> Table:
    """Keeps the balancer's own connections (probes, reports, long polls) out of the connection table: when that is
    full, they still work. Loopback is left alone: Docker's DNS is translated there."""
    inbound = f"! -i lo -p tcp -m tcp --dport {OWN_PORTS} -m addrtype --dst-type LOCAL -j CT --notrack"
    outbound = f"! -o lo -p tcp -m tcp --sport {OWN_PORTS} -j CT --notrack"
    hooks = {"PREROUTING": (f"-j {OWN_IN}",), "OUTPUT": (f"-j {OWN_OUT}",)}
    return Table("raw", {OWN_IN: (inbound,), OWN_OUT: (outbound,)}, hooks)


def filters(rotation: Sequence[Endpoint], retries: bool = True) -> Table:
    """Turns a refusal into a second try.

    A SYN that reaches the balancer itself was sent to no backend: dropped, so that the client's resend, a second
    later, finds whoever is ready by then. A RST that is a backend's first packet is dropped while there is another
    backend to try: conntrack has closed the flow on seeing it, so the resent SYN is a new connection, chosen anew.
    Without `retries` it goes through to the client.
    """
    undispatched = f"-p tcp -m tcp --dport {SERVICE_PORT} --tcp-flags FIN,SYN,RST,ACK SYN -j DROP"
    first_packet = "-m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply"
    refusal = f"-p tcp -m tcp --tcp-flags RST RST -m set --match-set {SET} src {first_packet} -j DROP"
    has_another = sum(endpoint.weight > 0 for endpoint in rotation) > 1
    chains: Chains = {INPUT: (undispatched,), FORWARD: (refusal,) if retries and has_another else ()}
    return Table("filter", chains, {"INPUT": (f"-j {INPUT}",), "FORWARD": (f"-j {FORWARD}",)})


def dispatch(rotation: Sequence[Endpoint]) -> Chains:
    """LB-DISPATCH and, past LEAF backends, the tree below it: a new connection passes O(log n) rules.

    The tree is a trie over the address's base-4 digits, least significant first. Docker hands out addresses in a row,
    so it is balanced; and a backend that comes, goes or changes weight changes only the chains on its own path.
    """
    chains: Chains = {}

    def grow(chain: str, members: list[Endpoint], path: str) -> None:
        if len(members) <= LEAF:
            chains[chain] = choice([(backend_chain(member.ip), member.weight) for member in members])
            return
        groups: dict[str, list[Endpoint]] = {}
        while len(groups) < 2:  # a digit all members share decides nothing: skip it
            digit, groups = len(path), {}
            for member in members:
                groups.setdefault(_digit(member, digit), []).append(member)
            path += next(iter(groups))
        targets = []
        for value, group in sorted(groups.items()):
            child = f"LB-T-{path[:-1]}{value}"
            targets.append((child, sum(member.weight for member in group)))
            grow(child, group, path[:-1] + value)
        chains[chain] = choice(targets)

    by_address = sorted(rotation, key=_address)
    weighted = [backend for backend in by_address if backend.weight > 0]
    grow(DISPATCH, weighted or [Endpoint(backend.ip, backend.port) for backend in by_address], "")
    return chains


def choice(targets: Sequence[tuple[str, float]]) -> Rules:
    """One rule a target, in order; target i is taken with chance w_i / (w_i + … + w_n) by what reaches its rule."""
    rules = []
    for i, (target, weight) in enumerate(targets[:-1]):
        rest = sum(weight for _, weight in targets[i:])
        rules.append(f"{_chance(weight / rest)} -j {target}")
    # The last rule has no probability: a guaranteed match, whatever rounding did to the others.
    rules += [f"-j {target}" for target, _ in targets[-1:]]
    return tuple(rules)


def _chance(p: float) -> str:
    return f"-m statistic --mode random --probability {probability(p)}"


def probability(p: float) -> str:
    """`p` as the kernel will hold it (a multiple of 2^-31) and `iptables-save` will print it."""
    return f"{round(min(max(p, 0.0), 1.0) * 2**31) / 2**31:.11f}"


def restore(table: Table, actual: Listing) -> str:
    """The text that takes `actual` to `table` in one atomic step; empty when there is nothing to change."""
    changed = [chain for chain, rules in table.chains.items() if actual.chains.get(chain) != rules]
    stale = [chain for chain in actual.chains if chain.startswith(PREFIX) and chain not in table.chains]
    hooks: list[str] = []
    for chain, rules in table.hooks.items():
        hooks += _hook_changes(chain, rules, actual.chains.get(chain, ()))
    if not (changed or stale or hooks):
        return ""
    lines = [f"*{table.name}", *(f":{chain} - [0:0]" for chain in [*changed, *stale])]
    lines += [f"-A {chain} {rule}" for chain in changed for rule in table.chains[chain]]
    lines += [*hooks, *(f"-X {chain}" for chain in stale), "COMMIT"]
    return "\n".join(lines) + "\n"


def _hook_changes(chain: str, wanted: Rules, actual: Rules) -> list[str]:
    """Deletes and inserts that put `wanted` first in a built-in chain; nothing where it is so already."""
    without_docker = tuple(rule for rule in actual if not is_dockers(rule))
    ours = [rule for rule in actual if is_ours(rule)]
    if without_docker[: len(wanted)] == wanted and len(ours) == len(wanted):
        return []
    deletes = [f"-D {chain} {rule}" for rule in ours]
    return deletes + [f"-I {chain} {place} {rule}" for place, rule in enumerate(wanted, 1)]


def is_hooked(nat: Listing) -> bool:
    """Whether new connections are led to our dispatch chain."""
    return DISPATCH in nat.chains and any(target_of(rule) == DISPATCH for rule in nat.chains.get("PREROUTING", ()))


def is_ours(rule: str) -> bool:
    return target_of(rule).startswith(PREFIX)


def is_dockers(rule: str) -> bool:
    """What Docker keeps in a container's nat table for its DNS."""
    return target_of(rule).startswith("DOCKER_")


def target_of(rule: str) -> str:
    """The rule's target; empty where it only counts."""
    match = re.search(r"(?:^| )-[jg] (\S+)", rule)
    return match[1] if match else ""


def set_changes(wanted: Iterable[str], present: Iterable[str], name: str = SET) -> str:
    """`ipset restore` text. A member already there is left alone: adding it again would zero its counters."""
    wanted, present = set(wanted), set(present)
    lines = [f"add {name} {ip}" for ip in sorted(wanted - present)]
    lines += [f"del {name} {ip}" for ip in sorted(present - wanted)]
    return "".join(line + "\n" for line in lines)


def _address(endpoint: Endpoint) -> int:
    return int(IPv4Address(endpoint.ip))


def _digit(endpoint: Endpoint, place: int) -> str:
    return str(_address(endpoint) >> (DIGIT_BITS * place) & (2**DIGIT_BITS - 1))
