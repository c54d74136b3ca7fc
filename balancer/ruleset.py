"""Backends and weights in, `iptables-restore` text out; listings in, counters out. Pure: runs nothing, reads nothing.

The path of a new connection, nat table (every chain of ours begins with LB-):

    PREROUTING ─▶ LB-DISPATCH ─▶ (LB-T-… inner chains of the tree) ─▶ LB-B-<ip>: DNAT ─▶ POSTROUTING ─▶ LB-MASQ

Promises:
- A text holds one table and changes only chains that differ from the listing it was made for; applied with
  `--noflush` it is atomic, and no chain that is not ours is touched.
- A backend's chain is written once, so the counter of its one rule (connections: nat sees first packets only) grows
  for as long as the backend is known, whatever happens to the dispatch above it.
- Shares are exact: rule i of a chain has probability w_i / (w_i + … + w_n) and the last has none.
- Rules are spelled as `iptables-save` prints them, so "is it still what we wrote?" is a comparison of strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address

SERVICE_PORT = 8000
PREFIX = "LB-"
DISPATCH, MASQUERADE, INPUT, FORWARD, COUNT = "LB-DISPATCH", "LB-MASQ", "LB-INPUT", "LB-FORWARD", "LB-COUNT"
SET = "LB-BACKENDS"
LEAF, DIGIT_BITS = 8, 2  # a chain deals to at most LEAF backends; past that it splits by one base-4 digit

Rules = tuple[str, ...]
Chains = dict[str, Rules]


@dataclass(frozen=True)
class Endpoint:
    """Where a backend listens, and its weight: any number ≥ 0; only ratios matter."""

    ip: str
    port: int
    weight: float = 1.0


@dataclass(frozen=True)
class Listing:
    """One table as `iptables-save -c` shows it: every chain's rules, and the packets its first rule has counted."""

    chains: Mapping[str, Rules] = field(default_factory=dict)
    packets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What we want of one table: our chains, and the one rule that leads from each built-in chain into ours."""

    name: str
    chains: Chains
    hooks: Mapping[str, str]


def backend_chain(ip: str) -> str:
    return f"LB-B-{ip}"


def nat(rotation: Sequence[Endpoint], draining: Iterable[Endpoint] = (), inside: str = "") -> Table:
    """Deals new connections over `rotation`; `draining` backends keep their chain, and so their counter.

    Clients are hidden behind the balancer's address, so that answers come back to it. With `inside`, the backends' own
    network, only the clients within it are: the backends then have their default route through the balancer.
    """
    chains = dispatch(rotation)
    for backend in sorted({*rotation, *draining}, key=_address):
        chains[backend_chain(backend.ip)] = (f"-p tcp -j DNAT --to-destination {backend.ip}:{backend.port}",)
    ours = f"-p tcp -m conntrack --ctstate DNAT --ctorigdstport {SERVICE_PORT}"  # never Docker's own DNAT, its DNS
    chains[MASQUERADE] = (f"{f'-s {inside} ' if inside else ''}{ours} -j MASQUERADE --random-fully",)
    service = f"-p tcp -m tcp --dport {SERVICE_PORT} -m addrtype --dst-type LOCAL"
    return Table("nat", chains, {"PREROUTING": f"{service} -j {DISPATCH}", "POSTROUTING": f"-j {MASQUERADE}"})


def mangle() -> Table:
    """Counts packets and bytes towards every backend with one rule: the set keeps a counter for each member."""
    return Table("mangle", {COUNT: (f"-m set --match-set {SET} dst",)}, {"FORWARD": f"-j {COUNT}"})


def filters(rotation: Sequence[Endpoint]) -> Table:
    """Turns a refusal into a second try.

    A SYN that reaches the balancer itself was dealt to nobody: dropped, so that the client's resend, a second later,
    finds whoever is ready by then. A RST that is a backend's first word is dropped while there is another backend to
    try: conntrack has closed the flow on seeing it, so the resent SYN is a new connection and is dealt anew.
    """
    undealt = f"-p tcp -m tcp --dport {SERVICE_PORT} --tcp-flags FIN,SYN,RST,ACK SYN -j DROP"
    first_word = "-m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply"
    refusal = f"-p tcp -m tcp --tcp-flags RST RST -m set --match-set {SET} src {first_word} -j DROP"
    chains: Chains = {INPUT: (undealt,), FORWARD: (refusal,) if sum(e.weight > 0 for e in rotation) > 1 else ()}
    return Table("filter", chains, {"INPUT": f"-j {INPUT}", "FORWARD": f"-j {FORWARD}"})


def dispatch(rotation: Sequence[Endpoint]) -> Chains:
    """LB-DISPATCH and, past LEAF backends, the tree below it: a new connection passes O(log n) rules.

    The tree is a trie over the address's base-4 digits, least significant first. Docker hands out addresses in a row,
    so it is balanced; and a backend that comes, goes or changes weight changes only the chains on its own path.
    """
    chains: Chains = {}

    def grow(chain: str, members: list[Endpoint], path: str) -> None:
        if len(members) <= LEAF:
            chains[chain] = deal([(backend_chain(member.ip), member.weight) for member in members])
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
        chains[chain] = deal(targets)

    by_address = sorted(rotation, key=_address)
    weighted = [backend for backend in by_address if backend.weight > 0]
    grow(DISPATCH, weighted or [Endpoint(backend.ip, backend.port) for backend in by_address], "")
    return chains


def deal(targets: Sequence[tuple[str, float]]) -> Rules:
    """One rule a target, in order; target i is taken with chance w_i / (w_i + … + w_n) by what reaches its rule."""
    rules = []
    for i, (target, weight) in enumerate(targets[:-1]):
        rest = sum(weight for _, weight in targets[i:])
        rules.append(f"-m statistic --mode random --probability {probability(weight / rest)} -j {target}")
    # The last rule has no probability: a guaranteed match, whatever rounding did to the others.
    rules += [f"-j {target}" for target, _ in targets[-1:]]
    return tuple(rules)


def probability(p: float) -> str:
    """`p` as the kernel will hold it (a multiple of 2^-31) and `iptables-save` will print it."""
    return f"{round(min(max(p, 0.0), 1.0) * 2**31) / 2**31:.11f}"


def restore(table: Table, actual: Listing) -> str:
    """The text that takes `actual` to `table` in one atomic step; empty when there is nothing to change."""
    changed = [chain for chain, rules in table.chains.items() if actual.chains.get(chain) != rules]
    stale = [chain for chain in actual.chains if chain.startswith(PREFIX) and chain not in table.chains]
    hooks = [f"-A {chain} {rule}" for chain, rule in table.hooks.items() if rule not in actual.chains.get(chain, ())]
    if not (changed or stale or hooks):
        return ""
    lines = [f"*{table.name}", *(f":{chain} - [0:0]" for chain in [*changed, *stale])]
    lines += [f"-A {chain} {rule}" for chain in changed for rule in table.chains[chain]]
    lines += [*hooks, *(f"-X {chain}" for chain in stale), "COMMIT"]
    return "\n".join(lines) + "\n"


def parse_table(text: str) -> Listing:
    """Reads `iptables-save -c -t TABLE`."""
    chains: dict[str, list[str]] = {}
    packets: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            chains.setdefault(line[1:].split(" ", 1)[0], [])
        elif match := re.match(r"\[(\d+):\d+\] -A (\S+) ?(.*)", line):
            chain = match[2]
            packets.setdefault(chain, int(match[1]))
            chains.setdefault(chain, []).append(match[3])
    return Listing({chain: tuple(rules) for chain, rules in chains.items()}, packets)


def connections(listing: Listing) -> dict[str, int]:
    """Connections dealt to each backend since its chain was written, by address."""
    start = len(backend_chain(""))
    return {c[start:]: listing.packets.get(c, 0) for c in listing.chains if c.startswith(backend_chain(""))}


def parse_set(text: str) -> dict[str, tuple[int, int]]:
    """Reads `ipset save`: (packets, bytes) towards each member, by address."""
    members = re.finditer(rf"^add {SET} (\S+) packets (\d+) bytes (\d+)", text, re.MULTILINE)
    return {match[1]: (int(match[2]), int(match[3])) for match in members}


def set_changes(wanted: Iterable[str], present: Iterable[str]) -> str:
    """`ipset restore` text. A member already there is left alone: adding it again would zero its counters."""
    wanted, present = set(wanted), set(present)
    lines = [f"add {SET} {ip}" for ip in sorted(wanted - present)]
    lines += [f"del {SET} {ip}" for ip in sorted(present - wanted)]
    return "".join(line + "\n" for line in lines)


# A flow in one of these states has said its last word; in any other, somebody may still be waiting for an answer.
_OVER = ("TIME_WAIT", "CLOSE", "LAST_ACK")
_FLOW = re.compile(
    r"^tcp +6 \d+ (\S+) src=\S+ dst=\S+ sport=\d+ dport=(\d+) .*?src=(\S+) dst=\S+ sport=\d+ dport=\d+"
    r"(?: packets=(\d+) bytes=(\d+))?",
    re.MULTILINE,
)
_BARE = 64  # bytes: the most a packet without payload takes, with all of TCP's usual options


@dataclass
class Flows:
    """How many flows each backend has, by address: `live`, and of those `waiting`, without a byte of an answer yet."""

    live: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


def parse_flows(text: str) -> Flows:
    """Reads `conntrack -L -p tcp --dst-nat`; who waits can be told only where the kernel counts (nf_conntrack_acct)."""
    flows = Flows()
    for state, port, backend, packets, size in _FLOW.findall(text):
        if state not in _OVER and int(port) == SERVICE_PORT:
            flows.live[backend] = flows.live.get(backend, 0) + 1
            if packets and int(size) <= _BARE * int(packets):
                flows.waiting[backend] = flows.waiting.get(backend, 0) + 1
    return flows


def _address(endpoint: Endpoint) -> int:
    return int(IPv4Address(endpoint.ip))


def _digit(endpoint: Endpoint, place: int) -> str:
    return str(_address(endpoint) >> (DIGIT_BITS * place) & (2**DIGIT_BITS - 1))
