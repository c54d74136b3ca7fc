"""The ways from a client to the backends that are compared, and what each needs while it is measured.

Ways that are only rules are written before and removed after each measurement, so that no way passes the rules of
another one. Proxies and projects of the product run all the time; without traffic they use almost no processor time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rules
from bench.host import MANY, RUN, SUBNET, bridge, docker, free_port, run, start
from bench.product import NGINX, Product, processes_of
from cli import network
from engines.options import BALANCER_SYSCTLS, SYSCTLS

PUBLISHED = "published port, no balancer"
HOST_PATH, BRIDGE_PATH = "this project, host path", "this project, bridge path"
HAPROXY_HOST, HAPROXY_BRIDGE = "HAProxy, host network", "HAProxy, bridge"
NGINX_HOST, NGINX_BRIDGE = "nginx stream, host network", "nginx stream, bridge"
KUBE, COURSE = "kube-proxy's rules", "course project's rules"

WRITE_RULES = Path(__file__).with_name("write_rules.py").read_text()
# By the flavour of iptables that the product uses in a namespace of its own, so that only the rules differ.
RESTORE = "if iptables-legacy -t nat -S >/dev/null 2>&1; then iptables-legacy-restore; else iptables-nft-restore; fi"
PROXY_SYSCTLS = {"net.ipv4.ip_local_port_range": "1024 65000"}
Addresses = Sequence[str]


@contextmanager
def nothing(_ips: Addresses) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Way:
    """`ports`: the host's port for a number of backends; 0: for any number. `active` prepares it for these backends;
    `processes` are those that it needs besides the kernel."""

    name: str
    ports: Mapping[int, int]
    active: Callable[[Addresses], AbstractContextManager[None]] = nothing
    processes: Callable[[], list[int]] = list

    def port(self, backends: int) -> int:
        return self.ports.get(backends) or self.ports[0]


class Site:
    """The containers of one run: backends, proxies and the ways made of rules."""

    def __init__(self, bench_image: str, balancer_image: str) -> None:
        self.bench_image, self.balancer_image = bench_image, balancer_image
        self.published = free_port()
        self.ips: list[str] = []
        for number in (1, 2, 3):
            publish = {self.published: 8000} if number == 1 else {}
            self._backend(f"backend-{number}", f"198.19.1.{number}", publish)
            self.ips.append(f"198.19.1.{number}")
        many = self._backend("many", "198.19.1.9", {})
        docker("exec", many, "ip", "route", "add", "local", MANY, "dev", "lo")
        run("ip", "route", "add", MANY, "via", "198.19.1.9", "dev", bridge())

    def _backend(self, name: str, address: str, publish: Mapping[int, int]) -> str:
        command = ("sh", "/bench/backend.sh")
        return start(name, self.bench_image, command, publish=publish, sysctls=SYSCTLS, address=address)

    # -- no balancer, and proxies --------------------------------------------------------------------------------------

    def published_port(self) -> Way:
        return Way(PUBLISHED, {0: self.published})

    def haproxy(self, on_host: bool) -> Way:
        ports = self._proxy_ports(on_host)
        services = [(own, "random", self.ips[:count]) for count, (_, own) in ports.items()]
        command = 'printf "%s" "$CONFIG" >/run/haproxy.cfg && exec haproxy -f /run/haproxy.cfg'
        return self._proxy(
            HAPROXY_HOST if on_host else HAPROXY_BRIDGE, ports, command, rules.haproxy(services), on_host
        )

    def nginx_stream(self, on_host: bool) -> Way:
        ports = self._proxy_ports(on_host)
        services = [(own, self.ips[:count]) for count, (_, own) in ports.items()]
        command = 'printf "%s" "$CONFIG" >/run/nginx.conf && exec nginx -e stderr -c /run/nginx.conf'
        return self._proxy(
            NGINX_HOST if on_host else NGINX_BRIDGE, ports, command, rules.nginx_stream(services), on_host
        )

    def leastconn(self, ips: Addresses) -> Way:
        """HAProxy on the host's network for backends of the product. Needs its own container for each call."""
        port = free_port()
        command = 'printf "%s" "$CONFIG" >/run/haproxy.cfg && exec haproxy -f /run/haproxy.cfg'
        config = rules.haproxy([(port, "leastconn", ips)])
        return self._proxy("HAProxy, leastconn", {3: (port, port)}, command, config, True)

    @staticmethod
    def _proxy_ports(on_host: bool) -> dict[int, tuple[int, int]]:
        """For each number of backends: the host's port and the proxy's."""
        ports = {}
        for number, count in enumerate((1, 3)):
            port = free_port()
            ports[count] = (port, port if on_host else 8000 + number)
        return ports

    def _proxy(self, name: str, ports: Mapping[int, tuple[int, int]], command: str, config: str, on_host: bool) -> Way:
        container = start(
            name.replace(", ", "-").replace(" ", "-"),
            self.bench_image,
            ("sh", "-c", command),
            network="host" if on_host else RUN,
            publish={} if on_host else dict(ports.values()),
            sysctls={} if on_host else PROXY_SYSCTLS,
            environment={"CONFIG": config},
        )
        return Way(name, {n: port for n, (port, _) in ports.items()}, processes=lambda: processes_of(container))

    # -- rules ---------------------------------------------------------------------------------------------------------

    def kube_proxy(self) -> Way:
        port = free_port()

        @contextmanager
        def active(ips: Addresses) -> Iterator[None]:
            text = rules.kube_proxy(port, ips)
            try:
                run("iptables-restore", "--noflush", "-w", "5", text=text)
                yield
            finally:
                run("iptables-restore", "--noflush", "-w", "5", text=rules.removal(text))

        return Way(KUBE, {0: port}, active)

    def course(self) -> Way:
        port = free_port()
        container = self._balancer("course", port, {"net.ipv4.ip_forward": "1"})

        @contextmanager
        def active(ips: Addresses) -> Iterator[None]:
            docker("exec", "-i", container, "sh", "-c", RESTORE, text=rules.course(ips))
            yield

        return Way(COURSE, {0: port}, active)

    def host_rules(self, sticky: int = 0, known: int = 0) -> Way:
        """The product's rules alone in the host's namespace. `known`: clients in the sets of sticky clients."""
        port = free_port()
        container = start("rules-host" + "-sticky" * bool(sticky), self.balancer_image, network="host")
        path = {"ports": [(port, 8000)], "prefix": "LB-benc-", "bridge": bridge(), "subnet": SUBNET, "sticky": sticky}

        @contextmanager
        def active(ips: Addresses) -> Iterator[None]:
            try:
                write_rules(container, path, ips, known)
                yield
            finally:
                write_rules(container, path, None)

        return Way(HOST_PATH, {0: port}, active)

    def bridge_rules(self) -> Way:
        """The product's rules alone in a container, and its rules on the host."""
        port = free_port()
        container = self._balancer("rules-bridge", port, BALANCER_SYSCTLS)

        @contextmanager
        def active(ips: Addresses) -> Iterator[None]:
            write_rules(container, {"ports": [(8000, 8000)]}, ips)
            with ExitStack() as undo:
                for table, chain, *rule in network.host_rules(bridge(), SUBNET, RUN):
                    command = ("iptables", "-w", "5", "-t", table)
                    place = network.place_in(chain, run(*command, "-S", chain).splitlines())
                    run(*command, "-I", chain, str(place), *rule)
                    undo.callback(run, *command, "-D", chain, *rule)
                yield

        return Way(BRIDGE_PATH, {0: port}, active)

    def _balancer(self, name: str, port: int, sysctls: Mapping[str, str]) -> str:
        """A container for rules of its own."""
        container = start(name, self.balancer_image, publish={port: 8000}, sysctls=sysctls)
        docker("exec", container, "ip", "route", "add", MANY, "via", "198.19.1.9")
        return container


def write_rules(container: str, path: Mapping[str, Any], ips: Addresses | None, known: int = 0) -> None:
    order = json.dumps({"path": path, "ips": ips, "known": known})
    docker("exec", "-i", "-w", "/balancer", container, "python3", "-c", WRITE_RULES, text=order)


def many(count: int) -> list[str]:
    """Consecutive addresses, as Docker assigns them, of one container."""
    return [f"198.19.{64 + (number >> 8)}.{number & 255}" for number in range(1, count + 1)]


def product_way(product: Product, name: str) -> Way:
    return Way(name, {0: product.port}, processes=product.processes)


def nginx_products(image: str) -> dict[str, Product]:
    """The product on both data paths, with nginx as backends."""
    common = ("--image", image, *NGINX, "--min", "1")
    return {HOST_PATH: Product("h", *common, "--datapath", "host"), BRIDGE_PATH: Product("b", *common)}


def sample_products() -> dict[str, Product]:
    """The product with its sample server, which computes, once with adaptive and once with equal shares."""
    common = ("--min", "3", "--datapath", "host")
    return {
        f"this project, {weights}": Product(weights, *common, "--weights", weights) for weights in ("adaptive", "equal")
    }
