"""systemd runs the manager: what `systemctl` and a kill do, while clients are served."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from cli import unit
from e2e.conftest import FAST, System, docker, wait_until

pytestmark = pytest.mark.skipif(not unit.usable(), reason="needs root, and systemd as this host's init")


def systemctl(verb: str, system: System, *words: str) -> str:
    command = ["systemctl", verb, unit.name(system.project), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def answers(system: System) -> bool:
    try:
        return bool(system.status())
    except OSError:
        return False


def test_unit_ends_starts_and_restarts_the_manager_and_clients_notice_nothing(fresh: System) -> None:
    fresh.up("2", *FAST, "--env", "PASSWORD=not-for-all", "--at-boot")
    containers = docker("ps", "-q", "--filter", f"label=lbscaler.project={fresh.project}")
    assert "not-for-all" not in systemctl("show", fresh) + systemctl("cat", fresh)
    assert systemctl("is-enabled", fresh) == "enabled"
    systemctl("stop", fresh)
    assert (answers(fresh), fresh.serves()) == (False, True)
    for verb in ("start", "restart"):
        systemctl(verb, fresh)
        wait_until(lambda: answers(fresh), f"the manager after {verb}")
    for program in ("manager", "supervisor"):
        for how in (signal.SIGTERM, signal.SIGKILL):
            killed = fresh.manager_pid()
            os.kill(int((fresh.run_dir / f"{program}.pid").read_text()), how)
            wait_until(lambda pid=killed: fresh.manager_pid() != pid and answers(fresh), f"{program} after {how}")
            assert fresh.serves()
    fresh.wait_for_active(2)
    assert docker("ps", "-q", "--filter", f"label=lbscaler.project={fresh.project}") == containers
    fresh.down("--now")
    assert fresh.nothing_left()
    assert systemctl("show", fresh, "-p", "LoadState", "--value") == "not-found"


def test_unit_starts_the_manager_after_everything_has_stopped_as_in_a_reboot(fresh: System) -> None:
    fresh.up("2", *FAST, "--at-boot")
    systemctl("stop", fresh)
    running = docker("ps", "-q", "--filter", f"label=lbscaler.project={fresh.project}").split()
    docker("stop", "--time", "1", *running)
    docker("start", f"{fresh.project}-balancer")
    rule = f"iptables-save -t raw | grep lbscaler.project={fresh.project} | sed s/^-A/-D/"
    subprocess.run(["bash", "-c", f"{rule} | xargs -L 1 iptables -w -t raw"], check=True)
    systemctl("start", fresh)
    wait_until(fresh.serves, "new backends serve")
    rules = subprocess.run(["iptables-save", "-t", "raw"], capture_output=True, text=True, check=True).stdout
    assert f"lbscaler.project={fresh.project}" in rules
