"""The rules of kube-proxy and of the course project, as `iptables-restore` text. Pure.

kube-proxy's chains have a prefix of their own here, so that a real kube-proxy on the host is not affected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PREFIX = "BENCH-KUBE-"
MARK = "0x4000/0x4000"
TARGET_PORT = 8000  # of all backends


def course(ips: Sequence[str]) -> str:
    """The course project's way: one list of DNAT rules in PREROUTING itself, each with its probability."""
    match = "-A PREROUTING -p tcp --dport 8000 -m addrtype --dst-type LOCAL"
    rules = []
    for number, ip in enumerate(ips):
        chance = f"-m statistic --mode random --probability {1 / (len(ips) - number):.10f}"
        rules.append(f"{match} {chance} -j DNAT --to-destination {ip}:{TARGET_PORT}")
    masquerade = "-A POSTROUTING -p tcp -m conntrack --ctstate DNAT -j MASQUERADE"
    return "\n".join(["*nat", *rules, masquerade, "COMMIT", ""])


def kube_proxy(port: int, ips: Sequence[str]) -> str:
    """The layout that kube-proxy writes for one service with a node port (externalTrafficPolicy: Cluster)."""
    return _kube_nat(port, ips) + _kube_filter()


def _kube_nat(port: int, ips: Sequence[str]) -> str:
    hooks = [
        f"-I PREROUTING 1 -j {PREFIX}SERVICES",
        f"-I OUTPUT 1 -j {PREFIX}SERVICES",
        f"-I POSTROUTING 1 -j {PREFIX}POSTROUTING",
    ]
    rules = [
        f"-A {PREFIX}SERVICES -m addrtype --dst-type LOCAL -j {PREFIX}NODEPORTS",
        f"-A {PREFIX}NODEPORTS -p tcp -m tcp --dport {port} -j {PREFIX}EXT",
        f"-A {PREFIX}EXT -j {PREFIX}MARK-MASQ",
        f"-A {PREFIX}EXT -j {PREFIX}SVC",
        f"-A {PREFIX}MARK-MASQ -j MARK --or-mark 0x4000",
        f"-A {PREFIX}POSTROUTING -m mark ! --mark {MARK} -j RETURN",
        f"-A {PREFIX}POSTROUTING -j MARK --xor-mark 0x4000",
        f"-A {PREFIX}POSTROUTING -j MASQUERADE --random-fully",
    ]
    chains = ["SERVICES", "NODEPORTS", "EXT", "SVC", "MARK-MASQ", "POSTROUTING"]
    for number, ip in enumerate(ips):
        chains.append(f"SEP-{number}")
        left = len(ips) - number
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        rules.append(f"-A {PREFIX}SVC {chance}-j {PREFIX}SEP-{number}")
        rules.append(f"-A {PREFIX}SEP-{number} -s {ip}/32 -j {PREFIX}MARK-MASQ")
        rules.append(f"-A {PREFIX}SEP-{number} -p tcp -m tcp -j DNAT --to-destination {ip}:{TARGET_PORT}")
    return _table("nat", chains, [*rules, *hooks])


def _kube_filter() -> str:
    rules = [
        f"-A {PREFIX}FORWARD -m conntrack --ctstate INVALID -j DROP",
        f"-A {PREFIX}FORWARD -m mark --mark {MARK} -j ACCEPT",
        f"-A {PREFIX}FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-I FORWARD 1 -j {PREFIX}FORWARD",
    ]
    return _table("filter", ["FORWARD"], rules)


def _table(name: str, chains: Sequence[str], rules: Sequence[str]) -> str:
    heads = [f":{PREFIX}{chain} - [0:0]" for chain in chains]
    return "\n".join([f"*{name}", *heads, *rules, "COMMIT", ""])


def haproxy(services: Sequence[tuple[int, str, Sequence[str]]]) -> str:
    """A configuration of HAProxy in TCP mode: (port, balance algorithm, addresses of the backends) of each service."""
    lines = [
        "global\n maxconn 8000\n nbthread 2",
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s",
        " option redispatch 1\n default-server check inter 1s",
    ]
    for port, algorithm, ips in services:
        lines.append(f"listen service{port}\n bind 0.0.0.0:{port} backlog 4096\n balance {algorithm}")
        lines += [f" server s{number} {ip}:{TARGET_PORT}" for number, ip in enumerate(ips)]
    return "\n".join([*lines, ""])


def nginx_stream(services: Sequence[tuple[int, Sequence[str]]]) -> str:
    """A configuration of nginx as a TCP proxy: (port, addresses of the backends) of each service."""
    lines = [
        "daemon off;\nworker_processes 2;\nworker_rlimit_nofile 16384;\nerror_log stderr crit;\npid /run/nginx.pid;",
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nevents { worker_connections 8192; }\nstream {",
    ]
    for port, ips in services:
        servers = " ".join(f"server {ip}:{TARGET_PORT};" for ip in ips)
        lines.append(f"upstream b{port} {{ random; {servers} }}")
        lines.append(f"server {{ listen 0.0.0.0:{port} backlog=4096; proxy_pass b{port}; }}")
    return "\n".join([*lines, "}", ""])


def removal(text: str) -> str:
    """The text that removes what `text` has added: first the rules in built-in chains, then the chains."""
    lines = []
    for line in text.splitlines():
        inserted = re.match(r"-I (\w+) 1 (.*)", line)
        if inserted:
            lines.append(f"-D {inserted[1]} {inserted[2]}")
        if line.startswith((f":{PREFIX}", "*")):
            lines.append(line)
        if line == "COMMIT":
            lines += [f"-X {chain}" for chain in _chains_of_last_table(lines)]
            lines.append(line)
    return "\n".join([*lines, ""])


def _chains_of_last_table(lines: Sequence[str]) -> list[str]:
    begin = max(number for number, line in enumerate(lines) if line.startswith("*"))
    return [line.split()[0].lstrip(":") for line in lines[begin:] if line.startswith(":")]
