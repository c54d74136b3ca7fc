"""Updates of a running system to another image, on a real engine: no request fails, and a bad image is taken back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from e2e.conftest import Load, System, docker, wait_until

Figure = Callable[[str], None]


@pytest.fixture
def system(three: System) -> System:
    three.operate("/scale", {"min": 3, "max": 3, "target": 100000})
    three.wait_for_active(3, 60)
    return three


def names(system: System) -> set[str]:
    return {backend["name"] for backend in system.active()}


def variant(system: System, tag: str, line: str) -> str:
    image = docker("inspect", "-f", "{{.Config.Image}}", next(iter(names(system))))
    recipe = f"FROM {image}\nLABEL lbscaler.image=test\n{line}\n"
    subprocess.run(["docker", "build", "-q", "-t", tag, "-"], input=recipe, text=True, check=True, capture_output=True)
    return docker("inspect", "-f", "{{.Id}}", tag)


def images(system: System) -> set[str]:
    return {docker("inspect", "-f", "{{.Image}}", name) for name in names(system)}


def test_update_replaces_every_backend_and_fails_no_request(system: System, figure: Figure) -> None:
    wanted = variant(system, "lbtest-new", "ENV NEW=1")
    load = Load(system.port, seconds=120, per_second=60)
    system.up("--image", "lbtest-new")
    wait_until(lambda: len(names(system)) == 3 and images(system) == {wanted}, "three new ones", 60)
    answered, others, slowest = load.stop()
    figure(f"update of three under 60 connections/s: {others} of {answered + others} failed, slowest {slowest:.2f} s")
    assert (answered > 300, others) == (True, 0)
    assert "replaced by the update" in system.log()


FAILING_SERVER = """\
import http.server as h
class Answer(h.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)
h.ThreadingHTTPServer(("", 8000), Answer).serve_forever()
"""
# Each cannot work in its own way: it crashes, serves on loopback alone (the probes see no difference to a slow start),
# or answers with an error.
# The probes are such that the backends before it stay healthy.
BAD_IMAGES = {
    "crash": ('ENTRYPOINT ["/bin/sh", "-c", "echo no such luck; exit 3"]', (), "no such luck"),
    "loopback": (
        'ENTRYPOINT ["python3", "-m", "http.server", "--bind", "127.0.0.1", "8000"]',
        ("--health", "tcp", "--ready-timeout", "4"),
        "not ready within 4 s",
    ),
    "error": (
        f"ENTRYPOINT {json.dumps(['python3', '-c', FAILING_SERVER])}",
        ("--health", "http:/", "--ready-timeout", "4"),
        "status 500",
    ),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_update_whose_backends_never_become_ready_fails_and_the_old_settings_are_restored(
    system: System, kind: str
) -> None:
    line, flags, reason = BAD_IMAGES[kind]
    before, stored = images(system), (system.run_dir / "settings.json").read_text()
    variant(system, f"lbtest-bad-{kind}", line)
    load = Load(system.port, seconds=120, per_second=60)
    output = system.up("--image", f"lbtest-bad-{kind}", *flags, status=1)
    assert "the update was given up, and what ran before is used again" in output
    assert reason in output
    _, others, _ = load.stop()
    assert others == 0
    system.wait_for_active(3, 60)
    assert images(system) == before
    assert (system.run_dir / "settings.json").read_text() == stored
    assert system.status()["launches"]["update_given_up"] == "", "the old settings are in use"


def test_failed_update_started_with_no_wait_stays_reported_after_a_manager_restart(
    system: System,
) -> None:
    before = images(system)
    variant(system, "lbtest-bad", 'ENTRYPOINT ["/bin/sh", "-c", "echo no such luck; exit 3"]')
    system.up("--image", "lbtest-bad", "--no-wait")
    try:
        wait_until(lambda: system.status()["launches"]["update_given_up"], "the update is given up", 60)
        system.kill_manager()
        assert system.status()["launches"]["update_given_up"]
        system.wait_for_active(3, 60)
        assert images(system) == before
        assert "An earlier update was given up" in system.up(), "nothing is changed, so it is not tried again"
    finally:
        system.up("--image", "")
    assert system.status()["launches"]["update_given_up"] == ""
