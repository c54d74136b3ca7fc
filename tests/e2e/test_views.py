"""Output and exit codes of run.sh's --status, --watch and --doctor on a running system."""

from __future__ import annotations

import json
import socket
import subprocess

from e2e.conftest import System, docker, wait_until


def run_view(system: System, *words: str, project: str = "", seconds: float = 60) -> tuple[int, str]:
    command = [str(system.tree / "run.sh"), "--project", project or system.project, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_status_is_printed_as_text_and_as_json(system: System) -> None:
    code, text = run_view(system, "--status")
    assert code == 0, text
    for backend in system.active():
        assert backend["name"] in text
        assert backend["ip"] in text
    code, text = run_view(system, "--status", "--json")
    found = json.loads(text)
    assert (code, found["desired"], found["state"], found["problems"]) == (0, 2, "healthy", [])


def test_status_is_degraded_without_reports_and_down_without_a_system(system: System) -> None:
    def signal_client(name: str) -> None:
        kill = f"kill -{name} $(cat /run/client.pid)"
        docker("exec", f"{system.project}-balancer", "sh", "-c", kill)

    signal_client("STOP")
    try:
        wait_until(lambda: run_view(system, "--status")[0] == 3, "degraded", 30)
    finally:
        signal_client("CONT")
    wait_until(lambda: run_view(system, "--status")[0] == 0, "healthy again", 30)
    code, text = run_view(system, "--status", project="nowhere")
    assert code == 1
    assert "nowhere" in text
    code, text = run_view(system, "--status", "--json", project="nowhere")
    assert (code, json.loads(text)["state"]) == (1, "down")


def test_watch_prints_plain_lines_without_a_terminal(system: System) -> None:
    command = [str(system.tree / "run.sh"), "--project", system.project, "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        line = watch.stdout.readline()
        watch.terminate()
        assert "\x1b" not in line
        assert "2" in line
        assert watch.wait(20) == 0


def test_doctor_passes_for_a_running_system_and_reports_a_taken_port(system: System) -> None:
    ports = ("--port", str(system.port), "--manager-port", str(system.manager_port))
    code, text = run_view(system, "--doctor", *ports)
    assert code == 0, text
    with socket.create_server(("127.0.0.1", 0)) as held:
        taken = str(held.getsockname()[1])
        code, text = run_view(system, "--doctor", "--json", *ports[2:], "--port", taken)
    assert code == 1, text
    (fault,) = [check for check in json.loads(text)["checks"] if check["verdict"] == "fault"]
    assert taken in fault["found"]
    assert "--port" in fault["fix"]
