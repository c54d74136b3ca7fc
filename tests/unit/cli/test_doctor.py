"""The doctor on a host whose programs and files are texts: which fault each text is, and which fix is given."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import fakes
from cli import doctor, host_checks, images, processes
from cli.doctor import FAULT, OK, WARN, Found, Host

DOCTOR = Path(doctor.__file__)
INFO = {
    **{"ServerVersion": "26.1.5+dfsg1", "Driver": "overlay2", "CgroupDriver": "systemd", "DockerRootDir": "/docker"},
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
}
MEMINFO = (
    "MemTotal:        8048012 kB\nMemFree:          300000 kB\nMemAvailable:    4194304 kB\nHugePages_Total:       0\n"
)
BUILTIN = "kernel/net/netfilter/xt_conntrack.ko\nkernel/net/netfilter/nft_compat.ko\n"
DEP = "".join(
    f"kernel/net/netfilter/{name}.ko.xz: kernel/net/netfilter/x_tables.ko.xz\n"
    for name in ("xt_statistic", "xt_addrtype", "xt_connbytes", "xt_nat", "xt_MASQUERADE", "xt_set")
)
IP_SET = "kernel/net/netfilter/ipset/ip_set_hash_ip.ko.xz: kernel/net/netfilter/ipset/ip_set.ko.xz\n"
TREE = "/lib/modules/6.12.0"
STAMP = str(doctor.ROOT / ".venv" / "stamp")


class FakeHost(Host):
    """Has the outputs of commands, by the beginning of their command line, and the files that a test gives it."""

    def __init__(self, **changes: object) -> None:
        super().__init__(fakes.settings(**changes), {})
        self.uid, self.may_install, self.python = 0, True, (3, 13, 5)
        self.ran: dict[str, CompletedProcess[str]] = {}
        self.files: dict[str, str] = {}
        self.error = 0.01

    def answers(self, command: str, out: str = "", code: int = 0, err: str = "") -> FakeHost:
        self.ran[command] = CompletedProcess(command, code, out, err)
        return self

    def serves(self, **changes: object) -> FakeHost:
        """An engine answers."""
        self.__dict__.pop("engine", None)  # the answer before
        return self.answers("docker info", json.dumps({**INFO, **changes}))

    def with_image(self) -> FakeHost:
        image = images.tag("balancer", self.settings.base_image)
        return self.serves().answers(f"docker image inspect {image}", "[{}]")

    def run(self, command: str, timeout: float = 15) -> CompletedProcess[str]:
        found = [done for begin, done in self.ran.items() if f"{command} ".startswith(f"{begin} ")]
        return (
            found[-1] if found else CompletedProcess(command, 127, "", f"{command.split(maxsplit=1)[0]} is not there")
        )

    def read(self, path: Path | str) -> str:
        return self.files.get(str(path), "").strip()

    def clock_error(self) -> float:
        return self.error


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What is installed; the kernel is always the same."""
    there = {"docker", "dockerd", "apt-get"}
    monkeypatch.setattr(shutil, "which", lambda program: program if program in there else None)
    monkeypatch.setattr(platform, "release", lambda: "6.12.0")
    return there


def test_versions_of_what_run_sh_needs_are_reported(host: FakeHost) -> None:
    host.files["/etc/os-release"] = 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n'
    host.answers("iptables --version", "iptables v1.8.11 (nf_tables)\n")
    system = f"Debian GNU/Linux 13 (trixie), Linux 6.12.0 {platform.machine()}, Python 3.13.5"
    assert doctor.versions(host) == Found(OK, f"{system}, no docker, iptables v1.8.11 (nf_tables)")
    host.answers("docker --version", "Docker version 26.1.5")
    assert ", Docker version 26.1.5, " in doctor.versions(host).found


def test_a_python_that_is_too_old_is_a_fault(host: FakeHost) -> None:
    host.python = (3, 10, 12)
    assert doctor.versions(host)[::2] == (FAULT, "install Python 3.11 or later as python3")
    host.python = (3, 11, 0)
    assert doctor.versions(host).verdict == OK


def test_python_without_ensurepip_is_a_warning_where_there_is_no_environment(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.versions(host)[::2] == (WARN, "run.sh installs python3-venv")
    host.files[STAMP] = "0123abcd  -\n"
    assert doctor.versions(host).verdict == OK


def test_missing_package_is_a_warning_where_run_sh_installs_it_else_a_fault(host: FakeHost, programs: set[str]) -> None:
    programs -= {"docker"}
    assert doctor.engine(host) == Found(WARN, "no docker", "run.sh installs docker-cli")
    programs -= {"dockerd"}
    assert doctor.engine(host) == Found(WARN, "no dockerd", "run.sh installs docker.io iptables")
    host.may_install = False
    assert doctor.engine(host).verdict == FAULT
    host.may_install = True
    programs -= {"apt-get"}
    assert doctor.engine(host).verdict == FAULT


def test_host_path_needs_a_firewall_backend_with_iptables() -> None:
    host = FakeHost(datapath="host").serves()
    assert doctor.engine(host).verdict == OK
    host.engine["FirewallBackend"] = {"Driver": "nftables"}
    assert doctor.engine(host)[::2] == (FAULT, "its firewall backend is nftables: leave out --datapath host")
    host.engine["FirewallBackend"] = {"Driver": "iptables+firewalld"}
    assert doctor.engine(host).verdict == OK


def test_engine_that_answers_is_reported_with_its_version(host: FakeHost) -> None:
    found = "26.1.5+dfsg1, storage overlay2, systemd cgroups"
    host.uid = 1000
    assert doctor.engine(host.serves()) == Found(OK, found)
    rootless = doctor.engine(host.serves(SecurityOptions=["name=seccomp", "name=rootless"]))
    assert rootless[:2] == (FAULT, f"{found}, rootless")


def test_an_engine_that_does_not_answer_is_a_warning_only_where_run_sh_starts_it(host: FakeHost) -> None:
    host.answers("docker info", '{"ServerErrors": ["x"]}', 0, "WARNING: y\nCannot connect to the Docker daemon\n")
    wanted = Found(WARN, "no engine answers: Cannot connect to the Docker daemon", "run.sh starts it")
    assert doctor.engine(host) == wanted
    host.uid = 1000
    assert doctor.engine(host).verdict == FAULT


def test_engine_of_another_host_is_a_fault(host: FakeHost) -> None:
    host.environ = {"DOCKER_HOST": "unix:///there.sock"}
    assert doctor.engine(host).verdict == FAULT
    assert doctor.engine(FakeHost().serves()).verdict == OK
    assert doctor.engine(host.serves()).verdict == OK
    host.environ = {"DOCKER_HOST": "tcp://192.0.2.1:2375"}
    assert doctor.engine(host)[::2] == (FAULT, "start it, or unset DOCKER_HOST")


def test_kernel_is_judged_by_trying_the_rules_where_the_image_exists(host: FakeHost) -> None:
    checks = "docker run --rm --label lbscaler.project=p --label lbscaler.role=check --network none --cap-drop ALL"
    reported = "missing in iptables-nft: set: not counted\niptables-legacy has all"
    host.with_image().answers(checks, reported)
    assert doctor.kernel(host) == Found(OK, f"tried: {reported}".replace("\n", "; "))
    host.answers(checks, "missing in iptables-nft: set: x\nmissing in iptables-legacy: set: x", 1)
    assert doctor.kernel(host).verdict == FAULT
    assert "iptables-legacy: set" in doctor.kernel(host).found
    assert "no space left" in doctor.kernel(host.answers(checks, "", 125, "no space left")).found


def test_kernel_is_judged_by_its_list_of_modules_where_there_is_no_image(host: FakeHost) -> None:
    host.serves()
    assert doctor.kernel(host)[:2] == (WARN, "not tried: no balancer image, no list of modules")
    host.files = {f"{TREE}/modules.builtin": BUILTIN, f"{TREE}/modules.dep": DEP + IP_SET}
    assert doctor.kernel(host)[:2] == (OK, f"built with what the rules need; no rule tried yet ({TREE})")
    host.files[f"{TREE}/modules.dep"] = DEP
    assert doctor.kernel(host)[:2] == (FAULT, f"without ip_set_hash_ip ({TREE})")


def test_port_that_a_foreign_process_uses_is_a_fault_and_our_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        host = FakeHost(bind="127.0.0.1", port=port, manager_port=port + 1 if port < 65535 else 1024)
        running = "docker ps --quiet --filter label=lbscaler.project=p"
        host.answers(running, "abc")
        host.answers(f"{running} --filter publish={port}", "")
        taken = doctor.service_port(host)
        assert taken[::2] == (FAULT, "end that, or choose another with --port PORT")
        assert taken.found.startswith(f"port {port} is taken by ")
        assert f"(pid {os.getpid()})" in taken.found
        monkeypatch.setattr(doctor, "REQUIRED", ("engine", "service port"))
        assert doctor.obstacles(host.serves()) == [f"{taken.found}; {taken.fix}"]
        with_publish = FakeHost(bind="127.0.0.1", publish=f"{port}:80 {port + 1}:81")
        assert doctor.service_port(with_publish).fix.endswith("choose another with --publish PORT:BACKEND-PORT")
        host.answers(f"{running} --filter publish={port}", "abc")
        assert doctor.service_port(host) == Found(OK, f"port {port} is used by this project")
        host = FakeHost(manager_port=port)
        assert doctor.manager_port(host)[::2] == (FAULT, "end that, or choose another with --manager-port PORT")
        monkeypatch.setattr(processes, "find", lambda project, program: [os.getpid()])
        assert doctor.manager_port(host).verdict == OK
    assert doctor.service_port(FakeHost(bind="127.0.0.1", port=port)) == Found(OK, f"port {port} is free")


def test_an_address_of_another_host_cannot_be_published_on() -> None:
    assert doctor.service_port(FakeHost(bind="192.0.2.1")).fix == "give an address of this host with --bind"


@pytest.mark.parametrize(
    ("subnet", "verdict"),
    [("10.8.0.0/20", FAULT), ("10.8.0.0/25", WARN), ("10.9.0.0/20", OK), ("", OK)],
)
def test_subnet_that_overlaps_a_route_is_reported(monkeypatch: pytest.MonkeyPatch, subnet: str, verdict: str) -> None:
    monkeypatch.setattr(host_checks, "host_routes", lambda: [IPv4Network("10.8.0.0/24")])
    assert doctor.routes(FakeHost(subnet=subnet)).verdict == verdict


def test_no_free_network_is_a_fault(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    monkeypatch.setattr(host_checks, "host_routes", lambda: [IPv4Network(pool) for pool in host_checks.POOLS])
    assert doctor.tried(host, doctor.routes)[::2] == (FAULT, "choose one with --subnet")


NETWORK: dict[str, Any] = {"Labels": {"lbscaler.project": "p"}, "IPAM": {"Config": [{"Subnet": "172.16.0.0/20"}]}}
NETWORK["Driver"] = "bridge"


def with_network(network: object = NETWORK, **changes: object) -> FakeHost:
    return FakeHost(**changes).answers("docker network inspect p", json.dumps([network]))


def test_projects_own_network_is_compared_with_other_routes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [IPv4Network(net) for net in ("172.16.0.0/20", "172.16.0.0/32", "172.16.0.1/32", "172.16.15.255/32")]
    routes = [*own, IPv4Network("172.31.0.0/16")]
    monkeypatch.setattr(host_checks, "host_routes", lambda: routes)
    assert doctor.routes(with_network()) == Found(OK, "172.16.0.0/20 overlaps no other route of this host")
    assert doctor.routes(FakeHost(subnet="172.16.0.0/20")).verdict == FAULT, "foreign routes, without our network"
    routes.append(IPv4Network("172.16.4.0/24"))
    assert doctor.routes(with_network())[:2] == (FAULT, "172.16.0.0/20 overlaps 172.16.4.0/24 of this host")


def test_network_of_that_name_has_to_be_of_the_project_and_keeps_its_subnet() -> None:
    assert doctor.network(FakeHost()) == Found(OK, "no network p yet")
    assert doctor.network(with_network()).verdict == OK
    assert doctor.network(with_network(subnet="172.16.0.0/20")).verdict == OK
    foreign = doctor.network(with_network({**NETWORK, "Labels": None}))
    assert foreign == (FAULT, "the network p is not of this project", "choose another name with --project")
    moved = doctor.network(with_network(subnet="10.9.0.0/20"))
    assert moved == (FAULT, "the network p is 172.16.0.0/20", "./stop.sh, then --subnet 10.9.0.0/20 applies")


@pytest.mark.parametrize(("driver", "has", "wanted"), [("overlay", "swarm", "docker"), ("bridge", "docker", "swarm")])
def test_project_of_another_orchestrator_is_not_changed(driver: str, has: str, wanted: str) -> None:
    host = with_network({**NETWORK, "Driver": driver}, orchestrator=wanted)
    fix = f"give --orchestrator {has}, or ./stop.sh first"
    assert doctor.network(host) == (FAULT, f"the project exists with --orchestrator {has}", fix)


JOINABLE = {"Name": "p-db", "Driver": "bridge", "Scope": "local", "Attachable": False, "EnableIPv6": False}
JOINABLE |= {"Internal": False}
OVERLAY = {"Driver": "overlay", "Scope": "swarm"}


def attach(name: str, changes: dict[str, Any] | None, **settings: object) -> Found:
    host = FakeHost(attach=f"good {name}", **settings).serves()
    host.answers("docker network inspect good", json.dumps([{**JOINABLE, **OVERLAY, "Attachable": True, "Name": "q"}]))
    if changes is not None:
        host.answers(f"docker network inspect {name}", json.dumps([{**JOINABLE, "Name": name, **changes}]))
    return doctor.attached(host)


@pytest.mark.parametrize(
    ("changes", "settings", "found"),
    [
        (None, {}, "there is no such network"),
        (OVERLAY, {}, "only services can join it"),
        ({}, {"orchestrator": "swarm"}, "it is on one node only"),
        ({"Name": "o"}, {"datapath": "host"}, "it would get the backends' default route, which --datapath host needs"),
        ({"EnableIPv6": True}, {"datapath": "host"}, "it would get the backends' default route, which --datapath ho"),
    ],
)
def test_network_that_backends_cannot_join_is_a_fault(
    changes: dict[str, Any] | None, settings: dict[str, object], found: str
) -> None:
    result = attach("p-db", changes, **settings)
    assert result.found.startswith(f"--attach p-db: {found}")
    assert (result.verdict, bool(result.fix)) == (FAULT, True)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"Name": "o"}, {}),
        ({**OVERLAY, "Attachable": True}, {}),
        (OVERLAY, {"orchestrator": "swarm"}),
        ({}, {"datapath": "host"}),
        ({"Name": "o", "Internal": True}, {"datapath": "host"}),
    ],
)
def test_network_that_backends_can_join_is_none(changes: dict[str, Any], settings: dict[str, object]) -> None:
    assert attach("p-db", changes, **settings) == Found(OK, "networks besides the project's: 2")


def test_networks_are_not_looked_for_without_an_engine() -> None:
    assert doctor.attached(FakeHost(attach="db")).verdict == OK


def test_unsynchronised_clock_is_a_warning(host: FakeHost) -> None:
    assert doctor.clock(host).verdict == OK
    host.error = 16.0
    assert doctor.clock(host).verdict == WARN


def test_full_disk_is_reported_for_each_place(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    room = {str(doctor.ROOT): 1 << 40, "/docker": 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, room[place]))  # type: ignore[attr-defined]
    assert doctor.disk(host) == Found(OK, f"1024.0 GiB free for {doctor.ROOT}")
    assert doctor.disk(host.serves()) == Found(OK, f"1.0 GiB free for /docker, 1024.0 GiB free for {doctor.ROOT}")
    room["/docker"] -= 1
    assert doctor.disk(host).verdict == WARN


def test_connection_table_is_reported_before_it_is_full(host: FakeHost) -> None:
    assert doctor.conntrack(host).found.startswith("not tried")
    count, most = (f"/proc/sys/net/netfilter/nf_conntrack_{name}" for name in ("count", "max"))
    host.files = {count: "70000\n", most: "100000\n"}
    assert doctor.conntrack(host).verdict == OK
    host.files[count] = "80001\n"
    assert doctor.conntrack(host).fix == "sysctl net.netfilter.nf_conntrack_max=400000"


def test_the_neighbour_table_has_to_have_room_for_the_most_backends() -> None:
    thresholds = {"/proc/sys/net/ipv4/neigh/default/gc_thresh3": "1024\n"}
    for most, verdict in ((500, OK), (501, WARN)):
        host = FakeHost(max=most)
        assert doctor.neighbours(host).found.startswith("not tried")
        host.files = thresholds
        assert doctor.neighbours(host).verdict == verdict
    assert "net.ipv4.neigh.default.gc_thresh3=3078" in doctor.neighbours(host).fix


def test_memory_is_counted_for_the_most_backends_and_says_how_many_fit() -> None:
    for changes, verdict in (({"max": 14}, OK), ({"max": 13, "spares": 2}, WARN), ({"memory": "1g"}, WARN)):
        host = FakeHost(**changes)
        host.files["/proc/meminfo"] = MEMINFO
        found = doctor.memory(host)
        assert found.verdict == verdict
    assert found.found == "4.0 GiB available; 10 more backends of 1g and the balancer may use 10.5 GiB"
    assert found.fix.startswith("3 more fit:")
    host.answers("docker ps", "a1\nb2\n")
    assert doctor.memory(host).found.startswith("4.0 GiB available; 8 more backends"), "two run"
    assert "may use 1.5 GiB" in doctor.memory(with_memory(memory="104858k")).found
    assert doctor.memory(with_memory(orchestrator="swarm", memory="1g")).verdict == OK, "other hosts have them"


def with_memory(**changes: object) -> FakeHost:
    host = FakeHost(**changes)
    host.files["/proc/meminfo"] = MEMINFO
    return host


# -- the whole -------------------------------------------------------------------------------------------------------


def test_check_that_raises_is_a_warning_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Host) -> Found:
        raise ValueError("no such thing")

    good = dict.fromkeys(("second", "third"), lambda _: Found(OK, "all is good"))
    monkeypatch.setattr(doctor, "CHECKS", {"first": fails, **good})
    assert doctor.report(FakeHost(), as_json=False) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=2) == ["first", "warn", "not tried: ValueError: no such thing"]
    assert second.split(maxsplit=2) == ["second", "ok", "all is good"]
    assert last == "would stop run.sh: 0; warnings: 1"


def test_rows_are_wrapped_at_a_hundred_columns() -> None:
    fix = "sysctl net.ipv4.neigh.default.gc_thresh1=2024 and --manager-port if that is not enough for all of them"
    lines = doctor.row("manager port", Found(FAULT, "word " * 30, fix)).splitlines()
    assert max(map(len, lines)) <= 100
    assert {line.index(line.split()[0]) for line in lines[1:]} == {lines[0].index("word")}
    assert " ".join(lines).count("word") == 30
    assert f"-> {fix}" in " ".join(" ".join(lines).split())
    for room in range(1, 80):
        assert "--manager-port" in doctor.row("a", Found(WARN, "b", f"{'x' * room} --manager-port PORT"))
    assert "->" not in doctor.row("clock", Found(OK, "good"))


def test_exit_code_is_1_where_something_would_stop_run_sh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"a": Found(OK, "x"), "b": Found(FAULT, "u", "v")}
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda _, one=one: one for name, one in found.items()})
    assert doctor.report(FakeHost(), as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["healthy"], report["checks"][1]) == (
        False,
        {"name": "b", "verdict": FAULT, "found": "u", "fix": "v"},
    )


def test_doctor_needs_the_standard_library_alone(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\necho no daemon >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LB_PROJECT": "p"}
    command = [sys.executable, "-I", "-S", "-c", f"import runpy, sys; sys.path.insert(0, {str(DOCTOR.parents[1])!r}); "]
    command[-1] += (
        "sys.argv[1:] = ['run.sh', '--doctor', '--json']; runpy.run_module('cli.arguments', run_name='__main__')"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert done.stderr == ""
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == len(doctor.CHECKS)
    assert [check["found"] for check in checks if "Error" in check["found"]] == []


def test_host_runs_programs_and_reads_files_that_may_not_exist(tmp_path: Path) -> None:
    host = Host(fakes.settings(), {"PATH": os.environ["PATH"]})
    done = host.run("sh -c 'echo out; echo err >&2; exit 3'")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert host.run("no-such-program").returncode == 127
    assert host.run("sleep 9", timeout=0.05).returncode == 127
    assert host.read(tmp_path / "nothing") == ""
    assert 0 < host.clock_error() < 3600
