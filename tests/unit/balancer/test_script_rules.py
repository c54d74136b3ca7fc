"""balancer/script.sh: its first rules are those of the client, its check of the kernel, and its drain."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ruleset
from datapath import DataPath
from listings import Listing
from restore import restore
from ruleset import Endpoint

BALANCER = Path(__file__).parents[3] / "balancer"


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{os.environ['PATH']}"
    command = ["bash", str(folder / "script.sh"), *arguments]
    environment = {"PATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=environment)


def tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script and the modules, which is also its /run."""
    for path in BALANCER.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "first_rules.py").unlink()
    shutil.copy(BALANCER / "first_rules.py", tmp_path)  # reads ip.txt beside it
    (tmp_path / "script.sh").write_text((BALANCER / "script.sh").read_text().replace("/run/", f"{tmp_path}/"))
    return tmp_path


def first_rules(addresses: list[str], *ports: tuple[int, int]) -> str:
    """The client's text for the same tables of an empty kernel."""
    path = DataPath(ports or ((8000, 8000),))
    nat = ruleset.nat([Endpoint(ip) for ip in addresses], path=path)
    return restore(nat, Listing()) + restore(ruleset.raw(), Listing())


@pytest.mark.parametrize("ports", [[(8000, 8000)], [(8000, 9090)], [(8000, 80), (8001, 443)]])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_first_rules_are_those_of_the_client(folder: Path, count: int, ports: list[tuple[int, int]]) -> None:
    addresses = [f"198.18.0.{number}" for number in range(2, 2 + count)]
    (folder / "ip.txt").write_text("".join(f"{ip}\n" for ip in addresses))
    done = run(
        folder, "rules", LB_PORTS=",".join(f"{port}:{backend_port}" for port, backend_port in ports), LB_STICKY="60"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == first_rules(addresses, *ports)


def test_blank_lines_and_a_missing_last_newline_in_the_list_are_accepted(folder: Path) -> None:
    (folder / "ip.txt").write_text("198.18.0.2\n\n  198.18.0.3")
    assert run(folder, "rules").stdout == first_rules(["198.18.0.2", "198.18.0.3"])


def test_without_a_list_the_first_rules_have_no_backends(folder: Path) -> None:
    assert run(folder, "rules").stdout == first_rules([])


def test_unknown_command_is_refused(folder: Path) -> None:
    done = run(folder, "dance")
    assert (done.returncode, done.stdout) == (2, "")
    assert "serve, rules, check, alive, drain SECONDS or remove" in done.stderr


@pytest.mark.parametrize(
    ("legacy_lacks", "nft_lacks", "status", "output"),
    [
        ("nothing", "all", 0, "iptables-legacy has all that is needed\n"),
        (
            "connbytes",
            "nothing",
            0,
            "missing in iptables-legacy: connbytes: clients receive a backend's refusal\n"
            "iptables-nft has all that is needed\n",
        ),
        (
            "CONNMARK",
            "notrack",
            1,
            "missing in iptables-legacy: connmark: weights stay equal, and only probes find a frozen backend\n"
            "missing in iptables-nft: CT target: probes and reports need room in the connection table\n",
        ),
        (
            "statistic",
            "to-destination",
            1,
            "missing in iptables-legacy: statistic: nothing is balanced\n"
            "missing in iptables-nft: DNAT: no connection reaches a backend\n",
        ),
    ],
)
def test_check_prints_missing_features_and_what_is_lost(
    folder: Path, legacy_lacks: str, nft_lacks: str, status: int, output: str
) -> None:
    for flavour, lacks in (("legacy", legacy_lacks), ("nft", nft_lacks)):
        tool(folder, f"iptables-{flavour}-restore", f"! grep -q -e '{lacks}'")
    tool(folder, "ipset", "exit 0")
    done = run(folder, "check")
    assert (done.returncode, done.stdout) == (status, output)


def test_check_prints_that_ipset_is_missing(folder: Path) -> None:
    tool(folder, "iptables-legacy-restore", "cat >/dev/null")
    tool(folder, "ipset", "exit 1")
    assert run(folder, "check").stdout.startswith("missing: ipset: packets and bytes are not counted\n")


@pytest.mark.parametrize(("raw_works", "output"), [(True, ""), (False, "script.sh: no rules in the raw table\n")])
def test_kernel_without_a_raw_table_gets_the_first_nat_rules(folder: Path, raw_works: bool, output: str) -> None:
    (folder / "ip.txt").write_text("198.18.0.2\n")
    refused = "none" if raw_works else "raw"
    body = f'text=$(cat); echo "$text" >>{folder}/restored; case $text in "*{refused}"*) exit 1 ;; esac'
    tool(folder, "iptables-legacy-restore", body)
    ends = f"touch {folder}/draining; kill $(cat {folder}/script.pid)"
    python = shutil.which("python3", path=os.environ["PATH"])
    tool(folder, "python3", f'case $1 in synchronization_client.py) {ends} ;; *) exec {python} "$@" ;; esac')
    script = (folder / "script.sh").read_text().replace("set -euo", f"echo $$ >{folder}/script.pid\nset -euo", 1)
    (folder / "script.sh").write_text(script)
    done = run(folder, "serve")
    assert output in done.stderr
    assert ("no rules in the raw table" in done.stderr) == bool(output)
    assert (folder / "flavour").read_text() == "legacy\n"
    assert "-A LB-B-198.18.0.2 " in (folder / "restored").read_text()


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process group of its own, which is ended with all that it has started."""
    command = ["bash", str(folder / "script.sh"), *arguments]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **environment}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as one:
        try:
            yield one
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ends", ["by itself", "by a signal"])
def test_after_a_drain_the_client_starts_again_and_not_before(folder: Path, ends: str) -> None:
    """As when stop.sh is interrupted: the drain goes on without it, and run.sh continues with the same container."""
    tool(folder, "iptables-legacy-restore", "cat >/dev/null")
    # Programs in the place of the client and of the drain, which end when the test wants it.
    client = f"echo >>{folder}/clients; exec sleep 60"
    drain = f"touch {folder}/drains; while [ ! -e {folder}/drained ]; do sleep 0.02; done"
    tool(folder, "python3", f"case $1 in synchronization_client.py) {client} ;; shutdown.py) {drain} ;; esac")
    clients = folder / "clients"
    with running(folder, "serve") as serve:
        until(clients.exists)
        with running(folder, "drain", "9") as draining:
            until((folder / "drains").exists)
            time.sleep(1.5)  # three times the pause before another client starts
            assert clients.read_text() == "\n"
            if ends == "by itself":
                (folder / "drained").touch()
            else:
                os.killpg(draining.pid, signal.SIGTERM)  # as `timeout` does
            draining.wait(20)
        until(lambda: clients.read_text() == "\n\n")
        serve.terminate()
        assert serve.wait(20) == 0
        os.killpg(serve.pid, signal.SIGKILL)  # the client: in a container, it ends with the first process
        assert serve.communicate()[1] == "script.sh: the client ended with status 143; starting it again\n"


def test_balancer_that_drains_when_it_is_stopped_starts_no_client_again(folder: Path) -> None:
    """In a Swarm."""
    tool(folder, "iptables-legacy-restore", "cat >/dev/null")
    client = f"echo >>{folder}/clients; exec sleep 60"
    drain = f'echo "$2 $3" >{folder}/drained; sleep 1.5'
    tool(folder, "python3", f"case $1 in synchronization_client.py) {client} ;; shutdown.py) {drain} ;; esac")
    with running(folder, "serve", LB_LEAVE="7") as serve:
        until((folder / "clients").exists)
        serve.terminate()
        _, log = serve.communicate(timeout=20)
        assert (serve.returncode, log) == (0, "")
    assert ((folder / "drained").read_text(), (folder / "clients").read_text()) == ("drain 7\n", "\n")
