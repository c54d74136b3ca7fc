"""Renders backends and weights as tables of iptables rules. Pure: runs nothing, reads nothing.

The path of a new connection through the nat table (all chains of a project begin with its prefix, here LB-):

    PREROUTING ─▶ LB-DISPATCH ─▶ (LB-T-… inner chains of the tree) ─▶ LB-B-<ip>: DNAT ─▶ POSTROUTING ─▶ LB-MASQ

Guarantees:
- A backend's chain is written once. So the counter of its DNAT rule, which counts connections because the nat table
  sees first packets only, grows for as long as the backend is known, however often the dispatch chains are rewritten.
- Shares are exact: rule i of a chain has probability w_i / (w_i + … + w_n), and the last rule has none.
- Only packets of the service are changed. In the host's namespace, other traffic passes only a few rules of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from datapath import CHECK_PORTS, OWN_NAMESPACE, DataPath
from features import MARKS, NOTRACK, RETRIES, Feature
from listings import Listing
from restore import Chains, Rules, Table, target_of

LEAF, DIGIT_BITS = 8, 2  # a chain dispatches to at most LEAF backends; with more, it branches on one base-4 digit

# Bits of a connection's mark: the client has sent data, the backend has sent data. Other bits are left as they are.
REQUEST_MARK, REPLY_MARK = 0x20000000, 0x40000000
# Source ports of the balancer's own connections (the manager sets ip_local_port_range), and those for masquerading.
OWN_PORTS, MASQUERADE_PORTS = "60000:65535", "1024-59999"
MAX_CHECKED = 8  # backends that self-check connections are spread over
SYN = "--tcp-flags FIN,SYN,RST,ACK SYN"  # matches a connection's first packet
DNAT = "-m conntrack --ctstate DNAT"  # matches connections that were dispatched
HOST_UNREACHABLE = "-p icmp -m icmp --icmp-type 3/1"  # matches the message that nobody has an address
PUSH = "-p tcp -m tcp --tcp-flags PSH PSH"  # matches packets with data, at least the last one of each write


@dataclass(frozen=True)
class Endpoint:
    """A backend's address and its weight: any number > 0; only ratios matter."""

    ip: str
    weight: float = 1.0


def tables(
    rotation: Sequence[Endpoint],
    others: Collection[Endpoint] = (),
    path: DataPath = OWN_NAMESPACE,
    check_source: str = "",
    missing: Collection[Feature] = (),
) -> list[Table]:
    """All tables, in the order in which they have to be written. `others` are the backends out of rotation, `missing`
    the features that this kernel lacks. Self-check connections come from `check_source`; they do not count as load."""
    wanted = [
        nat(rotation, others, path, check_source),
        filters(path, check_source, RETRIES not in missing and len(rotation) > 1, MARKS not in missing),
    ]
    # On the host, ports do not show which connections are the balancer's own.
    return wanted if path.on_host or NOTRACK in missing else [*wanted, raw(path)]


# -- nat: which backend a new connection goes to ---------------------------------------------------------------------


def nat(
    rotation: Sequence[Endpoint],
    others: Collection[Endpoint] = (),
    path: DataPath = OWN_NAMESPACE,
    check_source: str = "",
) -> Table:
    """Dispatches new connections over `rotation`. The `others` keep their chain, and so their counter."""
    chains = dispatch(rotation, path)
    for backend in sorted({*rotation, *others}, key=_address):
        chains[path.backend_chain(backend.ip)] = _backend_rules(backend, path)
    chains[path.chain("MASQ")] = _masquerade(path)
    # From PREROUTING, and for the host's own clients from OUTPUT, into dispatch.
    entry = []
    for port, backend_port in path.ports:
        if check_source and port == path.ports[0][0]:
            # Self-checks first, into a chain of their own: the backends' chains count connections.
            chains[path.chain("CHECK")] = _check(rotation, backend_port)
            source_ports = f"--sport {CHECK_PORTS[0]}:{CHECK_PORTS[1]} "
            entry.append(_to_service(path, port, "CHECK", f"-s {check_source}/32 ", source_ports))
        entry.append(_to_service(path, port, "STICKY" if path.sticky else "DISPATCH"))
    if path.sticky:
        chains[path.chain("STICKY")] = _sticky(rotation, others, path)
    hooks = {"PREROUTING": tuple(entry), "POSTROUTING": (f"-j {path.chain('MASQ')}",)}
    if path.on_host:
        hooks["OUTPUT"] = tuple(entry)
    return Table("nat", chains, hooks, path.prefix)


def is_hooked(actual: Listing, path: DataPath = OWN_NAMESPACE) -> bool:
    """Whether a rule in PREROUTING of this nat table leads new connections to dispatch."""
    targets = {target_of(rule) for rule in actual.chains.get("PREROUTING", ())}
    return path.dispatch in actual.chains and bool(targets & {path.dispatch, path.chain("STICKY")})


def _to_service(path: DataPath, port: int, chain: str, source: str = "", source_ports: str = "") -> str:
    """The rule that leads packets to the service into `chain`."""
    address = f"-d {path.address}/32 " if path.address else ""
    # In its own namespace, the balancer does not track connections whose beginning it has not seen (tcp_loose=0). The
    # host does, so there such a connection's packets must not be sent to any backend.
    first_packet = f" {SYN}" if path.on_host else ""
    matches = f"-p tcp -m tcp {source_ports}--dport {port}{first_packet} -m addrtype --dst-type LOCAL"
    return f"{source}{address}{matches} -j {path.chain(chain)}"


def _backend_rules(backend: Endpoint, path: DataPath) -> Rules:
    """The DNAT rules of one backend, one for each port of the service."""
    rules = []
    for port, backend_port in path.ports:
        match = f"-p tcp -m tcp --dport {port}" if len(path.ports) > 1 else "-p tcp"
        rules.append(f"{match} -j {_dnat(backend, backend_port)}")
    if path.sticky:
        for name in (path.clients_set, path.sticky_set(backend.ip)):
            rules.insert(0, f"-j SET --add-set {name} src --exist --timeout {path.sticky}")
    return tuple(rules)


def _sticky(rotation: Sequence[Endpoint], others: Collection[Endpoint], path: DataPath) -> Rules:
    """Sends a client to the backend in rotation that it had before, and a new client to dispatch."""
    # New clients, with one lookup for any number of backends.
    rules = [f"-m set ! --match-set {path.clients_set} src -j {path.dispatch}"]
    for backend in sorted(rotation, key=_address):
        rules.append(f"-m set --match-set {path.sticky_set(backend.ip)} src -j {path.backend_chain(backend.ip)}")
    # Clients whose backend has left rotation. They keep their next one when it returns.
    for backend in sorted(others, key=_address):
        rules.append(f"-j SET --del-set {path.sticky_set(backend.ip)} src")
    return (*rules, f"-j {path.dispatch}")


def _masquerade(path: DataPath) -> Rules:
    """Gives connections a source address to which the backends' answers come back.

    In its own namespace, that is the balancer's address, for all clients of the service: Docker's DNS has its own DNAT
    in this table. On the host, answers to most clients come back anyway. Only the backends themselves, which would
    answer each other directly, and clients on the loopback interface need another address.
    """
    if not path.on_host:
        ports = sorted(path.service_ports)
        service = f"{ports[0]}" if len(ports) == 1 else f"{ports[0]}:{ports[-1]}"
        match = f"-p tcp -m conntrack --ctstate DNAT --ctorigdstport {service}"
        return (f"{match} -j MASQUERADE --to-ports {MASQUERADE_PORTS} --random-fully",)
    sources = (path.subnet, "127.0.0.0/8")
    match = f"-d {path.subnet} -o {path.bridge} -p tcp -m conntrack --ctstate DNAT"
    return tuple(f"-s {source} {match} -j MASQUERADE --random-fully" for source in sources)


def _check(rotation: Sequence[Endpoint], backend_port: int) -> Rules:
    """Equal shares over a few backends."""
    checked = sorted(rotation, key=_address)[:MAX_CHECKED]
    return _choice([(_dnat(backend, backend_port), 1.0) for backend in checked], match="-p tcp ")


def _dnat(backend: Endpoint, port: int) -> str:
    return f"DNAT --to-destination {backend.ip}:{port}"


def dispatch(rotation: Sequence[Endpoint], path: DataPath = OWN_NAMESPACE) -> Chains:
    """LB-DISPATCH and, above LEAF backends, the tree below it: a new connection passes O(log n) rules.

    The tree is a trie over the address's base-4 digits, least significant first. Docker assigns consecutive addresses,
    so it is balanced. A backend that is added, removed or gets another weight changes only the chains on its own path.
    """
    chains: Chains = {}

    def grow(chain: str, members: list[Endpoint], digits: str) -> None:
        if len(members) <= LEAF:
            chains[chain] = _choice([(path.backend_chain(member.ip), member.weight) for member in members])
            return
        groups: dict[str, list[Endpoint]] = {}
        while len(groups) < 2:  # skip digits that all members share
            digit, groups = len(digits), {}
            for member in members:
                groups.setdefault(_digit(member, digit), []).append(member)
            digits += next(iter(groups))
        # One child chain for each value of the digit, with the sum of its members' weights. The loop has put a value of
        # this digit at the end; each child has its own value there.
        targets = []
        for value, group in sorted(groups.items()):
            child = path.chain(f"T-{digits[:-1]}{value}")
            targets.append((child, sum(member.weight for member in group)))
            grow(child, group, digits[:-1] + value)
        chains[chain] = _choice(targets)

    grow(path.dispatch, sorted(rotation, key=_address), "")
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


def _address(endpoint: Endpoint) -> int:
    return int(IPv4Address(endpoint.ip))


def _digit(endpoint: Endpoint, place: int) -> str:
    return str(_address(endpoint) >> (DIGIT_BITS * place) & (2**DIGIT_BITS - 1))


# -- filter: counters, failed connections, and what may pass ---------------------------------------------------------


def filters(path: DataPath = OWN_NAMESPACE, check_source: str = "", retries: bool = True, marks: bool = True) -> Table:
    """Counts packets, and makes a client's kernel try a failed connection again.

    A SYN that reaches this host itself was not dispatched, because no backend was ready. It is dropped: the client
    sends it again a second later. `retries`: whether rotation has another backend to try. `marks`: whether connections
    can be marked.

    The counters are here instead of in a mangle table, because each table costs every packet some time, and because
    iptables cannot remove an empty mangle table from the host.
    """
    forward, inputs = path.chain("FORWARD"), path.chain("INPUT")
    refusal = (_refusal(path),) if retries else ()
    check = _skip_check(check_source)
    chains = _unanswered(path, check, refusal) if marks else {}
    # With marks, an answered connection's packets do not pass the rules for those before the first reply.
    first = (f"-m connmark --mark 0x0/{REPLY_MARK:#x} -j {path.chain('UNANSWERED')}",) if marks else refusal
    unreachable = path.chain("UNREACHABLE")
    chains[unreachable] = (_unreachable(path),) if retries else ()
    no_answer = (f"{HOST_UNREACHABLE} -j {unreachable}",)
    # One rule counts the packets and bytes to all backends: the set keeps a counter for each member.
    count = f"-m set --match-set {path.traffic_set} dst"
    if not path.on_host:
        # Everything that this namespace forwards is traffic of the service.
        chains[forward] = (*first, *check, count)
        chains[inputs] = undispatched(path)
        hooks: dict[str, Rules] = {"FORWARD": (f"-j {forward}",), "INPUT": (f"-j {inputs}",), "OUTPUT": no_answer}
        return Table("filter", chains, hooks, path.prefix)
    replies, outputs, received = path.chain("REPLY"), path.chain("OUTPUT"), path.chain("RECEIVED")
    # Docker would drop packets to a port that it has not published.
    chains[forward] = (*first, count, "-j ACCEPT")
    chains[replies] = (*first, f"{DNAT} -j ACCEPT", _invalid(path))
    # Clients may also run on the host itself. The self-check does.
    chains[outputs] = (*first, *check, count)
    chains[received] = first
    chains[inputs] = (*undispatched(path), _to_loopback(path), f"-i {path.bridge} {DNAT} -j {received}")
    requests = f"{DNAT} --ctdir ORIGINAL"
    answers = "-p tcp -m conntrack --ctstate INVALID,DNAT"
    hooks = {
        "FORWARD": (f"-o {path.bridge} {requests} -j {forward}", f"-i {path.bridge} {answers} -j {replies}"),
        # A packet's interface is still the one before translation here.
        "OUTPUT": (f"{requests} -j {outputs}", *no_answer),
        "INPUT": (f"-j {inputs}",),
    }
    return Table("filter", chains, hooks, path.prefix)


def _skip_check(check_source: str) -> Rules:
    """Self-check connections are no load."""
    if not check_source:
        return ()
    ports = f"{CHECK_PORTS[0]}:{CHECK_PORTS[1]}"
    return (f"-p tcp -m conntrack --ctorigsrc {check_source} --ctorigsrcport {ports} -j RETURN",)


def _unanswered(path: DataPath, check: Rules, refusal: Rules) -> Chains:
    """For connections before their first reply. The first packet with data of each side marks the connection, and the
    backend's first one is counted in a set of its own."""
    unanswered, first_reply = path.chain("UNANSWERED"), path.chain("FIRST-REPLY")
    mark_request, mark_reply = _set_mark(REQUEST_MARK), _set_mark(REPLY_MARK)
    return {
        unanswered: (
            f"-m conntrack --ctdir REPLY -g {first_reply}",
            f"{PUSH} -m set --match-set {path.traffic_set} dst ! --update-counters {mark_request}",
        ),
        first_reply: (
            *refusal,
            *check,
            f"{PUSH} -m set --match-set {path.replies_set} src",
            f"{PUSH} -m set --match-set {path.traffic_set} src ! --update-counters {mark_reply}",
        ),
    }


def _set_mark(bit: int) -> str:
    return f"-j CONNMARK --set-xmark {bit:#x}/{bit:#x}"


def _invalid(path: DataPath) -> str:
    """The kernel does not translate such a packet, so the client would answer the foreign address with a reset."""
    return f"-s {path.subnet} -m conntrack --ctstate INVALID -j DROP"


def _to_loopback(path: DataPath) -> str:
    """The bridge accepts packets to loopback addresses, for the answers to the host's own clients and for no others."""
    return f"-d 127.0.0.0/8 -i {path.bridge} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"


def undispatched(path: DataPath) -> Rules:
    """The rules that drop connections which were not dispatched."""
    address = f"-d {path.address}/32 " if path.address else ""
    return tuple(f"{address}-p tcp -m tcp --dport {port} {SYN} -j DROP" for port, _ in path.ports)


def failed_connections(actual: Listing, path: DataPath = OWN_NAMESPACE) -> dict[str, int]:
    """What the rules of this filter table have dropped since they were written: attempts that a backend refused, and
    attempts for which there was no backend. Clients repeat both."""
    no_backend = sum(actual.dropped.get(rule, 0) for rule in undispatched(path))
    return {"refused": actual.dropped.get(_refusal(path), 0), "no_backend": no_backend}


def _refusal(path: DataPath) -> str:
    """Drops a RST that is a backend's first packet, a refusal. Conntrack has closed the flow, so the client's next SYN
    is dispatched again."""
    first_packet = "-m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply"
    return f"-p tcp -m tcp --tcp-flags RST RST -m set --match-set {path.traffic_set} src {first_packet} -j DROP"


def _unreachable(path: DataPath) -> str:
    """Drops this kernel's own message that nobody has a backend's address, which would end the client's attempt. So the
    client sends its SYN again, and that one is dispatched again once the backend has left rotation."""
    backends = f" --ctreplsrc {path.subnet}" if path.on_host else ""
    return f"{DNAT}{backends} -j DROP"


# -- raw: the balancer's own connections -----------------------------------------------------------------------------


def raw(path: DataPath = OWN_NAMESPACE) -> Table:
    """Keeps the balancer's own connections (probes, reports, long polls) out of the connection table, so that they work
    when it is full. Loopback is left alone: Docker's DNS is translated there."""
    own_in, own_out = path.chain("OWN-IN"), path.chain("OWN-OUT")
    # The ports are matched by the hooks, because every packet of the service passes these.
    hooks = {
        "PREROUTING": (f"! -i lo -p tcp -m tcp --dport {OWN_PORTS} -j {own_in}",),
        "OUTPUT": (f"! -o lo -p tcp -m tcp --sport {OWN_PORTS} -j {own_out}",),
    }
    inbound = "-m addrtype --dst-type LOCAL -j CT --notrack"
    return Table("raw", {own_in: (inbound,), own_out: ("-j CT --notrack",)}, hooks, path.prefix)
