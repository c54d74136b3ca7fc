"""`--datapath host` on a real engine: clients, open downloads, other programs' rules, several ports, sticky clients."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import FAST, Load, System, docker, free_port, wait_until
from netns.lab import Namespace

HOST, OUTSIDE = "198.19.254.1", "198.19.254.2"
Figure = Callable[[str], None]


def firewall() -> str:
    """All rules and sets of this host, without counters and comments."""
    text = ""
    for flavour in ("nft", "legacy"):
        tables = Path("/proc/net/ip_tables_names").read_text().split()
        if flavour == "nft" or tables:  # a call of the legacy program would create its tables
            text += subprocess.run([f"iptables-{flavour}-save"], capture_output=True, text=True, check=True).stdout
    rules = [re.sub(r" \[\d+:\d+\]", "", line) for line in text.splitlines() if not line.startswith("#")]
    sets = subprocess.run(["ipset", "save"], capture_output=True, text=True, check=True).stdout
    return "\n".join(rules) + sets


@pytest.fixture(scope="module")
def outside() -> Iterator[Namespace]:
    """A host outside, connected to this one."""
    made, link = Namespace(), f"lbout{os.getpid() % 10000}"
    peer = ["peer", "name", "eth0", "netns", made.path]
    subprocess.run(["ip", "link", "add", link, "type", "veth", *peer], check=True)
    subprocess.run(["ip", "addr", "add", f"{HOST}/30", "dev", link], check=True)
    subprocess.run(["ip", "link", "set", link, "up"], check=True)
    made.run("ip", "addr", "add", f"{OUTSIDE}/30", "dev", "eth0")
    made.run("ip", "link", "set", "eth0", "up")
    made.run("ip", "route", "add", "default", "via", HOST)
    yield made
    made.close()
    subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)


@pytest.fixture(scope="module")
def running(tree: Path) -> Iterator[System]:
    system = System(tree, f"lbhost{os.getpid()}")
    system.up("3", *FAST, "--min", "3", "--max", "8", "--target", "100000", "--datapath", "host")
    yield system
    system.down("--now")


@pytest.fixture
def system(running: System) -> System:
    running.wait_for_active(3, 60)
    wait_until(running.serves, "it serves", 20)
    return running


def answer(client: Namespace | None, address: str, port: int) -> str:
    with client or contextlib.nullcontext(), socket.create_connection((address, port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.makefile(newline="").read().rpartition("\r\n\r\n")[2]


def balancer(system: System) -> str:
    return f"{system.project}-balancer"


def test_clients_outside_on_the_host_and_among_the_backends_are_served(system: System, outside: Namespace) -> None:
    for client, address, seen in ((outside, HOST, OUTSIDE), (None, "127.0.0.1", ""), (None, HOST, HOST)):
        answers = [answer(client, address, system.port) for _ in range(30)]
        assert len({text.split(" ")[0] for text in answers}) == 3
        assert all(f"for {seen}" in text for text in answers)
    # A backend calls the service at the host's address, and is sometimes dispatched to itself.
    name = system.active()[0]["name"]
    url = f"http://{HOST}:{system.port}/"
    program = f"import urllib.request as u; print(u.urlopen('{url}', timeout=10).read().decode())"
    own = [docker("exec", name, "python3", "-c", program).split(" ")[0] for _ in range(8)]
    assert name in own or len(set(own)) > 1


def test_ports_of_the_service_are_reserved(system: System) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("0.0.0.0", system.port))


class Download(threading.Thread):
    """A connection that stays open, with a request now and then."""

    def __init__(self, client: Namespace, port: int) -> None:
        super().__init__()
        self.requests, self.failed, self.ended = 0, "", threading.Event()
        with client:
            self._connection = socket.create_connection((HOST, port), 10)

    def run(self) -> None:
        with self._connection:
            try:
                while not self.ended.wait(0.1):
                    self._connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert self._connection.recv(65536)
                    self.requests += 1
            except (OSError, AssertionError) as error:
                self.failed = repr(error)


def test_open_connections_survive_the_removal_of_the_balancer_and_a_killed_manager(
    system: System, outside: Namespace, figure: Figure
) -> None:
    open_ones = [Download(outside, system.port) for _ in range(6)]
    for one in open_ones:
        one.start()
    load = Load(system.port, seconds=8, per_second=60)
    time.sleep(1)
    docker("rm", "-f", balancer(system))
    wait_until(lambda: balancer(system) in docker("ps", "--format", "{{.Names}}").split(), "launched again", 20)
    system.kill_manager()
    answered, failed, slowest = load.result()
    for one in open_ones:
        one.ended.set()
        one.join()
    all_ = answered + failed
    figure(f"host path, balancer removed, manager killed: {failed} of {all_} failed, slowest {slowest:.2f} s")
    assert [one.failed for one in open_ones] == [""] * 6
    assert min(one.requests for one in open_ones) > 20
    assert failed == 0


def test_killed_backend_is_out_of_the_rules_and_is_replaced(system: System, outside: Namespace) -> None:
    name = system.active()[0]["name"]
    load = Load(system.port, seconds=4, per_second=60)
    time.sleep(1)
    docker("kill", name)
    answered, failed, _ = load.result()
    assert answered > 100
    assert failed <= 3  # its open requests
    wait_until(lambda: name not in {b["name"] for b in system.status()["backends"]}, "removed", 30)


def test_flush_of_the_firewall_is_repaired(system: System, outside: Namespace) -> None:
    [prefix] = set(re.findall(rf":(LB-\w{{6}}-)B-{system.active()[0]['ip']} ", firewall()))
    for damage in (("nat", "-F", f"{prefix}DISPATCH"), ("filter", "-F", f"{prefix}FORWARD")):
        subprocess.run(["iptables", "-w", "-t", *damage], check=True)
    wait_until(lambda: f"-A {prefix}DISPATCH" in firewall() and f"-A {prefix}FORWARD" in firewall(), "repaired", 10)
    assert "primes" in answer(outside, HOST, system.port)


def test_drops_in_docker_user_stay_in_force(system: System, outside: Namespace) -> None:
    rule = ["DOCKER-USER", "-s", f"{OUTSIDE}/32", "-p", "tcp", "-j", "DROP"]
    subprocess.run(["iptables", "-w", "-I", *rule], check=True)
    try:
        # Docker moves its hook when it creates a network.
        docker("network", "create", f"{system.project}-other")
        time.sleep(3)
        with pytest.raises(TimeoutError), outside:
            socket.create_connection((HOST, system.port), 2).close()
        assert "primes" in answer(None, HOST, system.port)
    finally:
        subprocess.run(["iptables", "-w", "-D", *rule], check=True)
        docker("network", "rm", f"{system.project}-other")


def test_another_data_path_is_refused_while_the_project_runs(system: System) -> None:
    output = system.up("--datapath", "bridge", status=1)
    assert "data path host; ./stop.sh, then --datapath bridge applies" in output
    assert system.serves()


def test_upgrade_of_the_balancer_and_other_options_lose_no_connection(system: System, outside: Namespace) -> None:
    """--sticky changes the balancer's options, so it is replaced."""
    open_one = Download(outside, system.port)
    open_one.start()
    load = Load(system.port, seconds=8, per_second=60)
    time.sleep(1)
    old = docker("inspect", "-f", "{{.Id}}", balancer(system))
    system.up("--sticky", "30")
    wait_until(lambda: old != docker("inspect", "-f", "{{.Id}}", balancer(system)), "replaced", 30)
    _, failed, _ = load.result()
    open_one.ended.set()
    open_one.join()
    assert (failed, open_one.failed) == (0, "")
    # The old rules stay until the new balancer has changed them. Then each client keeps its backend.
    wait_until(lambda: " -j SET --add-set LB-" in firewall(), "rules for sticky clients", 20)
    assert len({answer(outside, HOST, system.port).split(" ")[0] for _ in range(12)}) == 1


def test_stop_removes_all_rules_and_sets_of_the_project(system: System, outside: Namespace) -> None:
    """The last test of this module's system: it stops it."""
    bridge = f"br-{docker('network', 'inspect', '-f', '{{.Id}}', system.project)[:12]}"
    [prefix] = set(re.findall(rf"-o {bridge} .* -j (LB-\w{{6}}-)FORWARD", firewall()))
    system.down()
    assert prefix not in firewall()
    assert bridge not in firewall()
    assert system.nothing_left()
    with pytest.raises(ConnectionRefusedError):
        answer(outside, HOST, system.port)


# Other tests change Docker's rules, so nothing else may run while all rules are compared.
@pytest.mark.parametrize("datapath", ["bridge", pytest.param("host", marks=pytest.mark.serial)])
def test_each_published_port_leads_to_its_own_port_and_stop_leaves_the_rules_as_before(
    tree: Path, datapath: str
) -> None:
    """Also without a balancer that could remove its rules."""
    system, second, before = System(tree, f"lbports{os.getpid()}"), free_port(), firewall()
    ports = ["--publish", f"{system.port}:8000", "--publish", f"{second}:5000"]
    try:
        system.up("1", *FAST, "--min", "1", "--datapath", datapath, *ports)
        assert "primes" in answer(None, "127.0.0.1", system.port)
        assert "Not Found" in answer(None, "127.0.0.1", second)  # the sample server's readiness has only /sync
        docker("rm", "-f", balancer(system))
    finally:
        system.down("--now")
    if datapath == "host":
        assert firewall() == before
