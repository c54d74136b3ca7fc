"""The doctor over a host that is all text: what each listing comes to, and which mend stands beside which fault."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest

import doctor
import fakes
import preflight
from doctor import FAULT, OK, WARN, Check, Done, Host

DOCTOR = Path(doctor.__file__)
INFO = {
    **{"ServerVersion": "26.1.5+dfsg1", "Driver": "overlay2", "CgroupDriver": "systemd", "DockerRootDir": "/docker"},
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
}
DOCKER = """\
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i br-0123456789ab -p tcp -m tcp --dport 8000 -j DNAT --to-destination 172.16.0.2:8000
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -p udp -m udp --dport 5000 -j DROP
-A INPUT -p tcp -m tcp --dport 3306 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-USER -j RETURN
COMMIT
"""
CHAINS = """\
table ip filter {
	chain INPUT {
		type filter hook input priority filter; policy drop;
	}
}
table inet firewall {
	chain inbound {
		type filter hook input priority filter; policy drop;
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
"""
MEMINFO = (
    "MemTotal:        8048012 kB\nMemFree:          300000 kB\nMemAvailable:    4194304 kB\nHugePages_Total:       0\n"
)
BUILTIN = "kernel/net/netfilter/xt_conntrack.ko\nkernel/net/netfilter/nft_compat.ko\n"
DEP = "".join(
    f"kernel/net/netfilter/{name}.ko.xz: kernel/net/netfilter/x_tables.ko.xz\n"
    for name in ("xt_statistic", "xt_addrtype", "xt_connbytes", "xt_nat", "xt_MASQUERADE", "xt_set")
)
IP_SET = "kernel/net/netfilter/ipset/ip_set_hash_ip.ko.xz: kernel/net/netfilter/ipset/ip_set.ko.xz\n"
CONFIG = "".join(f"{option}=y\n" for option in doctor.MODULES.values())


class FakeHost(Host):
    """Answers commands by their first words, and files by their path, from what a test puts there; knows no others."""

    def __init__(self, **changes: object) -> None:
        super().__init__(fakes.settings(**changes), {})
        self.uid, self.release, self.python = 0, "6.12.0", (3, 13, 5)
        self.programs = {"docker", "dockerd", "apt-get"}
        self.ran: dict[str, Done] = {}
        self.files: dict[str, str] = {}
        self.gib = 50.0
        self.error = 0.01

    def answers(self, command: str, out: str = "", code: int = 0, err: str = "") -> FakeHost:
        self.ran[command] = Done(code, out, err)
        return self

    def serves(self, **changes: object) -> FakeHost:
        """An engine answers."""
        return self.answers("docker info", json.dumps({**INFO, **changes}))

    def with_image(self) -> FakeHost:
        self.serves().answers("bash", "abc").answers("docker image inspect lbscaler-balancer:abc", "[{}]")
        return self

    def run(self, *argv: str, timeout: float = 15) -> Done:
        told = [done for command, done in self.ran.items() if f"{' '.join(argv)} ".startswith(f"{command} ")]
        return told[-1] if told else Done(127, "", f"{argv[0]} is not there")

    def read(self, path: str) -> str:
        return self.files.get(path, "")

    def have(self, program: str) -> bool:
        return program in self.programs

    def free(self, place: str) -> int:
        return int(self.gib * doctor.GIB)

    def clock_error(self) -> float:
        return self.error


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


# -- parsers ---------------------------------------------------------------------------------------------------------


def test_dockers_own_rules_and_those_about_other_traffic_do_not_interfere() -> None:
    assert doctor.interfering(DOCKER, 8000, 5000) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (":INPUT ACCEPT [0:0]\n:FORWARD", ":INPUT DROP [9:99]\n:FORWARD"),
        ("-A DOCKER-USER -j RETURN", "-A INPUT -j REJECT --reject-with icmp-host-prohibited"),
        ("-A DOCKER-USER -j RETURN", "-A INPUT -p tcp -m multiport --dports 80,5000 -j DROP"),
        ("-A DOCKER-USER -j RETURN", "-A DOCKER-USER -i eth0 -j DROP"),
        (
            "-A POSTROUTING",
            "-A PREROUTING -i eth0 -p tcp -m tcp --dport 8000 -j REDIRECT\n-A POSTROUTING",
        ),
    ],
)
def test_a_rule_that_takes_reports_or_clients_away_is_found_word_for_word(before: str, after: str) -> None:
    assert before in DOCKER
    found = doctor.interfering(DOCKER.replace(before, after, 1), 8000, 5000)
    assert found == [after.splitlines()[0]]


def test_a_firewall_that_lets_the_managers_port_in_is_mended() -> None:
    rules = DOCKER.replace(":INPUT ACCEPT [0:0]\n:FORWARD", ":INPUT DROP [9:99]\n:FORWARD")
    mended = rules.replace("COMMIT\n*filter", "COMMIT\n*filter\n-A ufw-user-input -p tcp --dport 5000 -j ACCEPT")
    assert doctor.interfering(rules, 8000, 5000)
    assert doctor.interfering(mended, 8000, 5000) == []
    assert doctor.interfering(mended, 8000, 6000), "another port was let in"


def test_native_input_chains_that_drop_are_found_but_not_those_of_iptables_or_forward() -> None:
    assert doctor.dropping_chains(CHAINS) == ["inet firewall inbound"]


def test_a_module_is_there_when_it_is_built_in_or_can_be_loaded() -> None:
    assert doctor.missing_modules(BUILTIN + DEP + IP_SET) == []
    assert doctor.missing_modules(BUILTIN + DEP) == ["ip_set_hash_ip"]


def test_an_option_that_is_not_set_is_missing_and_a_module_may_not_be_seen() -> None:
    config = CONFIG.replace("XT_SET=y", "XT_SET=m").replace("CONFIG_NFT_COMPAT=y", "# CONFIG_NFT_COMPAT is not set")
    assert doctor.unbuilt(CONFIG) == ([], [])
    assert doctor.unbuilt(config) == (["nft_compat"], ["xt_set"])


def test_sizes_are_in_bytes() -> None:
    assert [doctor.size(text) for text in ("64k", "256m", "2g")] == [65536, 268435456, 2147483648]
    assert doctor.fields(MEMINFO)["MemAvailable"] == 4 * doctor.GIB
    assert [doctor.human(count) for count in (256 << 20, 3 << 29)] == ["256 MiB", "1.5 GiB"]


def test_routes_through_the_projects_own_bridge_are_not_others() -> None:
    table = (
        "172.16.0.0/20 dev br-0123456789ab proto kernel scope link src 172.16.0.1\n"
        "local 172.16.0.1 dev br-0123456789ab table local proto kernel scope host src 172.16.0.1\n"
        "172.16.4.0/24 dev tun0 proto kernel scope link src 172.16.4.2\n"
    )
    assert doctor.other_routes(table, "br-0123456789ab") == [IPv4Network("172.16.4.0/24")]


# -- checks ----------------------------------------------------------------------------------------------------------


def test_a_python_that_is_too_old_is_a_fault(host: FakeHost) -> None:
    assert doctor.python(host) == Check("Python", OK, "3.13.5")
    host.python = (3, 9, 2)
    assert doctor.python(host) == Check("Python", FAULT, "3.9.2", "install Python 3.10 or later as python3")


def test_the_system_is_told_and_what_run_sh_cannot_do_without(host: FakeHost) -> None:
    host.files["/etc/os-release"] = 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n'
    host.programs |= {"setsid", "timeout", "sha256sum", "find", "xargs"}
    lacking = doctor.system(host)
    assert (lacking.verdict, lacking.found.endswith("; without flock")) == (FAULT, True)
    host.programs |= {"flock"}
    assert doctor.system(host).verdict == OK
    assert doctor.system(host).found.startswith("Debian GNU/Linux 13 (trixie), Linux 6.12.0, ")


def test_an_environment_that_is_there_is_told_from_one_to_be_made(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements, stamp = (str(doctor.ROOT / path) for path in ("manager/requirements.txt", ".venv/stamp"))
    host.files = {requirements: "flask\n", stamp: hashlib.sha256(b"flask\n").hexdigest() + "  -\n"}
    assert doctor.environment(host).found == ".venv is there, with what the manager needs"
    host.files[requirements] = "flask==4\n"
    assert doctor.environment(host).found == "run.sh makes .venv and loads its packages (not tried)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.environment(host).mend == "run.sh installs python3-venv"


def test_a_user_needs_root_or_an_engine_that_answers(host: FakeHost) -> None:
    assert doctor.user(host) == Check("user", OK, "root")
    host.uid = 1000
    assert doctor.user(host).verdict == FAULT
    assert doctor.user(host.serves()).verdict == OK
    keeps = FakeHost(preserve_client_ip=1).serves()
    keeps.uid = 1000
    assert doctor.user(keeps).mend == "--preserve-client-ip needs root: sudo ./run.sh"


def test_what_run_sh_would_install_is_a_warning_and_a_fault_where_it_may_not(host: FakeHost) -> None:
    assert doctor.client(host) == Check("client", WARN, "no docker program", "run.sh installs docker-cli")
    host.environ["NO_INSTALL"] = "1"
    assert doctor.client(host).verdict == FAULT
    host.environ["NO_INSTALL"] = ""
    host.uid = 1000
    assert doctor.client(host).verdict == FAULT
    assert doctor.client(host.answers("docker --version", "Docker version 26.1.5")).found == "Docker version 26.1.5"


def test_an_engine_that_answers_is_told_with_its_versions(host: FakeHost) -> None:
    found = "26.1.5+dfsg1, storage overlay2, systemd cgroups"
    assert doctor.engine(host.serves()) == Check("engine", OK, found)
    assert doctor.engine(host.serves(Driver="vfs")).verdict == WARN
    rootless = doctor.engine(host.serves(SecurityOptions=["name=seccomp", "name=rootless"]))
    assert (rootless.verdict, rootless.found) == (FAULT, f"{found}, rootless")


def test_an_engine_that_does_not_answer_is_a_warning_only_where_run_sh_starts_it(host: FakeHost) -> None:
    host.answers("docker info", '{"ServerErrors": ["x"]}', 1, "WARNING: y\nCannot connect to the Docker daemon")
    wanted = Check("engine", WARN, "none answers: Cannot connect to the Docker daemon", "run.sh starts it")
    assert doctor.engine(host) == wanted
    host.uid = 1000
    assert doctor.engine(host).verdict == FAULT
    host.uid = 0
    host.programs -= {"dockerd"}
    assert doctor.engine(host).mend == "run.sh installs docker.io iptables"
    host.environ["DOCKER_HOST"] = "unix:///nowhere.sock"
    assert doctor.engine(host).mend == "start it, or unset DOCKER_HOST"
    host.environ["DOCKER_HOST"] = "tcp://192.0.2.1:2375"
    assert doctor.engine(host.serves()).mend == "the engine has to be on this host: unset DOCKER_HOST"


def test_the_kernel_is_judged_by_the_balancers_own_try_where_its_image_is_there(host: FakeHost) -> None:
    host.with_image().answers("docker run", "missing in iptables-nft: set: not counted\niptables-legacy has all")
    assert doctor.kernel(host) == Check("kernel", OK, "tried: iptables-legacy has all")
    host.answers("docker run", "missing in iptables-nft: set: x\nmissing in iptables-legacy: set: x", 1)
    failed = doctor.kernel(host)
    assert (failed.verdict, "iptables-legacy: set" in failed.found) == (FAULT, True)


def test_without_an_image_the_kernel_is_judged_by_what_is_built_or_said_not_to_be_tried(host: FakeHost) -> None:
    untried = doctor.kernel(host)
    assert (untried.verdict, untried.found[:9]) == (WARN, "not tried")
    host.files["/proc/config.gz"] = CONFIG.replace("XT_SET=y", "XT_SET=m")
    assert doctor.kernel(host).found.startswith("not tried: xt_set would have to be loaded")
    host.files["/lib/modules/6.12.0/modules.dep"] = BUILTIN + DEP + IP_SET
    assert doctor.kernel(host).verdict == OK
    host.files["/lib/modules/6.12.0/modules.dep"] = BUILTIN + DEP
    assert doctor.kernel(host).found == "without ip_set_hash_ip (/lib/modules/6.12.0)"


def test_the_firewall_is_told_with_its_flavour_and_to_root_alone(host: FakeHost) -> None:
    host.answers("iptables --version", "iptables v1.8.11 (nf_tables)").answers("iptables-save", DOCKER)
    assert doctor.firewall(host) == Check("firewall", OK, "iptables v1.8.11 (nf_tables); no rule interferes")
    told = doctor.firewall(host.answers("nft list chains", CHAINS))
    assert (told.verdict, told.mend) == (WARN, "let the project's network reach port 5000, clients port 8000")
    assert "nft inet firewall inbound drops" in told.found
    host.uid = 1000
    assert "not tried" in doctor.firewall(host).found


def test_a_port_that_a_stranger_holds_is_a_fault_and_our_own_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        host = FakeHost(bind="127.0.0.1", port=port, manager_port=port + 1 if port < 65535 else 1024).serves()
        taken = doctor.service_port(host)
        assert (taken.verdict, taken.mend) == (FAULT, "end that, or choose another with --port")
        assert f"(pid {os.getpid()})" in taken.found
        host.answers("docker ps", f"127.0.0.1:{port}->8000/tcp")
        assert doctor.service_port(host).found == f"{port}: held by this project's balancer"
        host = FakeHost(manager_port=port)
        assert doctor.manager_port(host).verdict == FAULT
        host.files[str(host.settings.run_dir / "manager.pid")] = f"{os.getpid()}\n"
        assert doctor.manager_port(host).verdict == OK
    assert doctor.service_port(FakeHost(bind="127.0.0.1", port=port)).found == f"{port}: free"


def test_an_address_of_another_host_cannot_be_published_on() -> None:
    assert doctor.service_port(FakeHost(bind="192.0.2.1")).mend == "name an address of this host with --bind"


@pytest.mark.parametrize(
    ("subnet", "verdict"),
    [("10.8.0.0/20", FAULT), ("10.8.0.0/25", WARN), ("10.9.0.0/20", OK), ("", OK)],
)
def test_a_network_that_overlaps_a_route_is_told(monkeypatch: pytest.MonkeyPatch, subnet: str, verdict: str) -> None:
    monkeypatch.setattr(preflight, "host_routes", lambda: [IPv4Network("10.8.0.0/24")])
    assert doctor.network(FakeHost(subnet=subnet)).verdict == verdict


def test_no_free_network_is_a_fault(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    monkeypatch.setattr(preflight, "host_routes", lambda: [IPv4Network(pool) for pool in preflight.POOLS])
    assert doctor.network(host).mend == "name one with --subnet"


def test_the_projects_own_network_is_measured_against_others_routes() -> None:
    there = {
        **{"Id": "0123456789ab" * 5, "Labels": {"lbscaler.project": "p"}},
        "IPAM": {"Config": [{"Subnet": "172.16.0.0/20"}]},
    }
    own = "172.16.0.0/20 dev br-0123456789ab proto kernel scope link src 172.16.0.1\n"
    other = "172.16.4.0/24 dev tun0 proto kernel scope link\n"
    host = FakeHost().serves().answers("docker network inspect p", json.dumps([there]))
    assert doctor.network(host).found == "172.16.0.0/20, this project's; overlaps not tried: no ip to list routes"
    assert doctor.network(host.answers("ip", own)).found == "172.16.0.0/20 overlaps no route of this host"
    assert doctor.network(host.answers("ip", own + other)).verdict == FAULT
    strangers = json.dumps([{**there, "Labels": {}}])
    assert doctor.network(host.answers("docker network inspect p", strangers)).found == "p is there and not ours"
    moved = FakeHost(subnet="10.9.0.0/20").serves().answers("docker network inspect p", json.dumps([there]))
    assert doctor.network(moved).mend == "./stop.sh first to have it be --subnet 10.9.0.0/20"


def test_a_clock_that_nobody_sets_is_a_warning(host: FakeHost) -> None:
    assert doctor.clock(host).verdict == OK
    host.error = 16.0
    assert doctor.clock(host).verdict == WARN


def test_too_little_room_stops_the_building_of_images_and_else_is_a_warning(host: FakeHost) -> None:
    assert doctor.disk(host).verdict == OK
    host.gib = 0.5
    assert doctor.disk(host).verdict == FAULT
    assert doctor.disk(host.with_image()).verdict == OK
    host.gib = 0.1
    assert doctor.disk(host).verdict == WARN
    assert (
        "0.1 GiB free for /docker" in doctor.disk(host).found or "102 MiB free for /docker" in doctor.disk(host).found
    )


def test_a_full_connection_table_is_told_before_it_is_full(host: FakeHost) -> None:
    assert doctor.connections(host).found == "not loaded yet"
    count, most = (f"/proc/sys/net/netfilter/nf_conntrack_{name}" for name in ("count", "max"))
    host.files = {count: "70000\n", most: "100000\n"}
    assert doctor.connections(host).verdict == OK
    host.files[count] = "80001\n"
    assert doctor.connections(host).mend == "sysctl net.netfilter.nf_conntrack_max=400000"


def test_the_neighbour_table_has_to_have_room_for_the_most_backends() -> None:
    thresholds = {"/proc/sys/net/ipv4/neigh/default/gc_thresh3": "1024\n"}
    for most, verdict in ((500, OK), (501, WARN)):
        host = FakeHost(max=most)
        assert doctor.neighbours(host).found.startswith("not tried")
        host.files = thresholds
        assert doctor.neighbours(host).verdict == verdict
    assert "net.ipv4.neigh.default.gc_thresh3=3078" in doctor.neighbours(host).mend


def test_memory_is_counted_for_the_most_backends_and_says_how_many_fit() -> None:
    for most, verdict in ((14, OK), (15, WARN)):
        host = FakeHost(max=most)
        host.files["/proc/meminfo"] = MEMINFO
        told = doctor.memory(host)
        assert told.verdict == verdict
    assert told.mend.startswith("14 fit:")


@pytest.mark.parametrize(("limit", "verdict"), [(1024, OK), (-1, OK), (1023, WARN)])
def test_few_open_files_are_a_warning(host: FakeHost, limit: int, verdict: str) -> None:
    host.open_files = limit
    assert doctor.open_files(host).verdict == verdict


# -- the whole -------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_itself_says_so_and_the_others_are_heard(host: FakeHost) -> None:
    def open_files(_: Host) -> Check:
        raise ValueError("no such thing")

    checks: list[Callable[[Host], Check]] = [open_files, doctor.python]
    first, second = doctor.examine(host, checks)
    assert first == Check("open files", WARN, "not tried: ValueError: no such thing")
    assert second.verdict == OK


def test_the_table_is_aligned_in_a_hundred_columns_and_loses_no_word() -> None:
    mend = "sysctl net.ipv4.neigh.default.gc_thresh1=2024 and --manager-port if that is not enough for all of them"
    checks = [Check("kernel", FAULT, "word " * 30, mend), Check("clock", OK, "well")]
    lines = doctor.table(checks).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].index("mend") == lines[1].index("sysctl")
    assert all(re.match(r"(\S| {20})", line) for line in lines), "what goes on stays in its column"
    assert "".join(lines).count("word") == 30
    assert "net.ipv4.neigh.default.gc_thresh1=2024" in doctor.table(checks)
    for room in range(1, 40):
        assert "--manager-port" in doctor.table([Check("a", WARN, "b", f"{'x' * room} --manager-port PORT")])
    assert "\033" not in doctor.table(checks)
    plain = re.sub(r"\033\[\d+m", "", doctor.table(checks, colour=True))
    assert plain == doctor.table(checks), "colours take no room"


def test_the_exit_code_says_whether_anything_would_stop_run_sh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Check("a", OK, "x"), Check("b", WARN, "y", "z")]
    monkeypatch.setattr(doctor, "examine", lambda host: found)
    assert doctor.main([], {}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 faults that would stop run.sh, 1 warning"
    found.append(Check("c", FAULT, "u", "v"))
    assert doctor.main(["--json", "--doctor"], {}) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["well"], told["checks"][2]) == (False, {"name": "c", "verdict": FAULT, "found": "u", "mend": "v"})


def test_a_bad_setting_or_flag_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([], {"LB_PORT": "x"}) == 2
    assert "LB_PORT" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--dance"], {})
    assert ended.value.code == 2


def test_it_examines_this_host_with_nothing_but_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\necho nobody is at home >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LB_PROJECT": "p"}
    command = [sys.executable, "-I", "-S", "-c", f"import runpy, sys; sys.path.insert(0, {str(DOCTOR.parent)!r}); "]
    command[-1] += f"sys.argv[1:] = ['--json']; runpy.run_path({str(DOCTOR)!r}, run_name='__main__')"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert done.stderr == ""
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == len(doctor.CHECKS)
    assert [check["found"] for check in checks if "Error" in check["found"]] == []


def test_the_real_host_runs_programs_reads_files_and_survives_what_is_not_there(tmp_path: Path) -> None:
    host = Host(fakes.settings(), {"PATH": os.environ["PATH"]})
    assert host.run("sh", "-c", "echo out; echo err >&2; exit 3") == (3, "out", "err")
    assert host.run("no-such-program").code == 127
    assert host.run("sleep", "9", timeout=0.05).code == 124
    assert host.read(str(tmp_path / "nothing")) == ""
    assert host.free(str(tmp_path / "not" / "yet")) > 0
    assert host.clock_error() > 0
