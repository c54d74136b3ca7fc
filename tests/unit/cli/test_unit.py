"""The systemd unit: its text, what systemd says of it, and when run.sh installs and stop.sh removes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import arguments, unit
from core.settings import SettingError
from fakes_host import System, until

NAME = "lbscaler-p.service"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: systemd runs the manager for root only")


pytestmark = pytest.mark.slow  # most tests run run.sh


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path, systemd=True)
    yield made
    made.close()


# -- its text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["plain", "a b", 'quote"d', "back\\slash"])
def test_unit_is_valid_and_restricted_whatever_the_path_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    monkeypatch.setattr(unit, "ROOT", tmp_path / folder)
    file = tmp_path / NAME
    file.write_text(unit.text("p"))
    for command in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=30", "--no-pager"]):
        done = subprocess.run(["systemd-analyze", *command, str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr if "verify" in command else "") == (0, ""), done.stdout


def test_percent_sign_of_a_path_is_no_specifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "ROOT", Path("/srv/%n"))
    assert "WorkingDirectory=/srv/%%n\n" in unit.text("p")
    assert 'ReadWritePaths="/srv/%%n/run"\n' in unit.text("p")


def test_two_projects_have_two_units() -> None:
    assert (unit.name("p"), unit.name("q")) == (NAME, "lbscaler-q.service")
    assert "supervise.sh --project q\n" in unit.text("q")


# -- a start and a stop ------------------------------------------------------------------------------------------------


@needs_root
def test_unit_of_a_start_has_no_settings_and_is_gone_after_a_reboot(system: System) -> None:
    system.up("3", "--image", "good", "--env", "PASSWORD=not-for-all")
    text = (system.runtime / NAME).read_text()
    assert "not-for-all" not in text + (system.state / "systemctl").read_text()
    environment = system.run_dir / "environment"
    assert ("not-for-all" in environment.read_text(), environment.stat().st_mode & 0o777) == (True, 0o600)
    assert list(system.boot.iterdir()) == []
    assert len(system.processes()) == 2
    system.down()
    assert list(system.runtime.iterdir()) == []
    assert system.nothing_left()
    assert not environment.exists()


@needs_root
def test_at_boot_enables_the_unit_once_it_serves_and_stop_removes_it(system: System) -> None:
    system.up("--image", "never", "--at-boot", status=1)
    assert list(system.boot.iterdir()) == list(system.runtime.iterdir()) == []
    system.up("--image", "good")
    processes = system.processes()
    output = system.up("--at-boot")
    assert f"Enabling {NAME}, which starts the manager at boot" in output
    assert (system.boot / NAME).read_text() == (system.runtime / NAME).read_text()
    assert (system.state / "systemctl").read_text().endswith(f"daemon-reload\nenable {NAME}\n")
    assert system.processes() == processes, "the manager continues"
    # Later starts change the unit that starts at boot.
    (system.boot / NAME).write_text("an earlier version")
    system.up("--max", "9")
    assert (system.boot / NAME).read_text() == (system.runtime / NAME).read_text()
    system.down()
    assert list(system.boot.iterdir()) == list(system.runtime.iterdir()) == []
    assert f"disable {NAME}\ndaemon-reload\nreset-failed {NAME}\n" in (system.state / "systemctl").read_text()
    assert system.nothing_left()


@needs_root
def test_settings_before_apply_again_where_the_unit_cannot_be_enabled(system: System) -> None:
    system.up("--image", "good")
    before = (system.run_dir / "settings.json").read_text()
    (system.state / "enable_fails").touch()
    system.up("--max", "9", "--at-boot", status=1)
    assert (system.run_dir / "settings.json").read_text() == before
    assert "LB_MAX=10\n" in (system.run_dir / "environment").read_text()


@needs_root
def test_unit_that_waits_for_its_restart_is_stopped_before_its_settings_change(system: System) -> None:
    system.up("--image", "good")
    for pid in system.processes():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not system.processes(), "supervisor and manager have ended")
    system.up("--max", "9")
    calls = (system.state / "systemctl").read_text()
    assert f"\nstop {NAME}\n" in calls


def test_at_boot_without_systemd_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "RUNTIME", tmp_path / "none")
    with pytest.raises(SettingError, match=r"^--at-boot needs root and systemd; .*\bcron\b.* run\.sh$"):
        arguments.run_arguments(["--at-boot"], {})
    assert not arguments.run_arguments([], {}).at_boot


@needs_root
def test_process_in_another_network_namespace_does_not_use_systemd() -> None:
    code = "from pathlib import Path; from cli import unit; unit.RUNTIME = Path('/'); print(unit.usable())"
    command = ["unshare", "--net", "python3", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(unit.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip("no network namespaces here")
    assert done.stdout == "False\n"


# -- the supervisor ----------------------------------------------------------------------------------------------------


def test_number_of_backends_is_for_the_first_start_of_a_supervisor_only(tmp_path: Path) -> None:
    system = System(tmp_path)
    try:
        system.up("3", "--image", "good")
        assert not (system.run_dir / "backends").exists()
        os.kill(int((system.run_dir / "supervisor.pid").read_text()), signal.SIGTERM)
        until(lambda: not system.processes(), "both have ended")
        command = [str(system.tree / "manager" / "supervise.sh"), "--project", "p"]
        with subprocess.Popen(command, env=system.environment, start_new_session=True) as supervisor:
            until(lambda: len(system.processes()) == 2, "both run")
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in system.processes()]
            supervisor.terminate()
        assert [command for command in commands if b"--backends" in command] == []
    finally:
        system.close()


def test_number_of_backends_is_kept_until_a_manager_has_started(tmp_path: Path) -> None:
    system = System(tmp_path)
    try:
        system.up("--image", "good")
        os.kill(int((system.run_dir / "supervisor.pid").read_text()), signal.SIGTERM)
        until(lambda: not system.processes(), "both have ended")
        (system.run_dir / "backends").write_text("3")
        (system.tree / "manager" / "script.py").write_text("raise SystemExit(1)")
        command = [str(system.tree / "manager" / "supervise.sh"), "--project", "p"]
        assert subprocess.run(command, env=system.environment, check=False).returncode == 1
        assert (system.run_dir / "backends").read_text() == "3"
    finally:
        system.close()


def test_manager_that_another_one_has_replaced_is_not_started_again(tmp_path: Path) -> None:
    system = System(tmp_path)
    try:
        system.up("--image", "good")
        (system.tree / "manager" / "script.py").write_text("raise SystemExit(4)")
        os.kill(int((system.run_dir / "manager.pid").read_text()), signal.SIGKILL)
        until(lambda: not system.processes(), "the supervisor has ended, too")
    finally:
        system.close()
