"""Backends that fail in part, on a real engine: they are ejected and replaced, and the others serve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import FAST, Load, System, docker, rotations, wait_until

Figure = Callable[[str], None]

# Answers after 50 ms; at once with an error while /tmp/broken is there; its health path while /tmp/ok is there.
SLEEPER = """
import asyncio, os, signal
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as process 1 it would be ignored
open("/tmp/ok", "w").close()
async def answer(reader, writer):
    request = await reader.readuntil(b"\\r\\n\\r\\n")
    if request.startswith(b"GET /ok "):
        status = "200 OK" if os.path.exists("/tmp/ok") else "404 Not Found"
    elif os.path.exists("/tmp/broken"):
        status = "500 Internal Server Error"
    else:
        status = "200 OK"
        await asyncio.sleep(0.05)
    writer.write(f"HTTP/1.1 {status}\\r\\nContent-Length: 3\\r\\nConnection: close\\r\\n\\r\\nok\\n".encode())
    await writer.drain()
    writer.close()
async def main():
    await (await asyncio.start_server(answer, "0.0.0.0", 8000, backlog=4096)).serve_forever()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def sleeper(tree: Path) -> str:
    image = docker("images", "-q", "--filter", "label=lbscaler.image=server").split()[0]
    entrypoint = json.dumps(["python3", "-c", SLEEPER])
    recipe = f"FROM {image}\nLABEL lbscaler.image=test\nENTRYPOINT {entrypoint}\n"
    subprocess.run(["docker", "build", "-q", "-t", "lbtest-sleeper", "-"], input=recipe, text=True, check=True)
    return "lbtest-sleeper"


@pytest.fixture
def sleepers(fresh: System, sleeper: str) -> Iterator[System]:
    fresh.flags += ("--image", sleeper, "--target", "100000")
    yield fresh


def shares(system: System) -> dict[str, float]:
    return {backend["name"]: backend["share"] for backend in system.active()}


def running_containers(system: System) -> set[str]:
    listed = docker("ps", "-q", "--no-trunc", "--filter", f"label=lbscaler.project={system.project}")
    return set(listed.split())


def test_four_unhealthy_of_five_stay_in_rotation_and_are_replaced_one_at_a_time(
    sleepers: System, figure: Figure
) -> None:
    sleepers.up("5", *FAST, "--min", "5", "--health", "http:/ok")
    names = [backend["name"] for backend in sleepers.active()[:4]]
    victims = {docker("inspect", "-f", "{{.Id}}", name) for name in names}  # a replacement may take a name over
    load = Load(sleepers.port, seconds=150, per_second=60)
    time.sleep(1)
    began = time.time()
    for name in names:
        docker("exec", name, "rm", "/tmp/ok")
    wait_until(lambda: sleepers.status()["rotation_panic"], "panic is reported", 10)
    fewest = 9
    while victims & (running := running_containers(sleepers)):
        serving = [found for at, found in rotations(sleepers) if at > began]
        fewest = min([fewest, *map(len, serving)])
        assert len(running) >= 6, "fewer containers than five backends and a balancer"
        assert time.time() - began < 100, sleepers.status()["backends"]
        time.sleep(0.5)
    replaced = time.time() - began
    wait_until(lambda: not sleepers.status()["rotation_panic"], "panic is over", 20)
    answered, others, slowest = load.stop()
    figure(
        f"health path gone in four of five: replaced within {replaced:.1f} s, never fewer than {fewest} in rotation, "
        f"{others} of {answered + others} requests failed, slowest {slowest:.2f} s"
    )
    assert (fewest >= 3, others) == (True, 0)
    assert "fewer than half of the backends are healthy" in sleepers.log()
    assert "unhealthy for" in sleepers.log()


def test_backend_that_answers_errors_fast_gets_no_more_than_its_share(sleepers: System, figure: Figure) -> None:
    sleepers.up("3", *FAST, "--min", "3", "--health", "tcp")
    time.sleep(5)  # past the slow start
    hole = sleepers.active()[0]["name"]
    docker("exec", hole, "touch", "/tmp/broken")
    load = Load(sleepers.port, seconds=14, per_second=110)
    highest = 0.0
    while load.running():
        highest = max(highest, shares(sleepers).get(hole, 0.0))
        time.sleep(0.5)
    answered, others, _ = load.result()
    part = others / (answered + others)
    figure(f"one of three fails at once: its share at most {highest:.3f}, {others} of {answered + others} failed")
    assert highest <= 1.25 / 3 + 0.01
    assert 0.2 < part < 0.45


@pytest.mark.paired  # the ejection is timed, and beside other tests it took up to 50 s instead of 13
def test_frozen_backend_is_ejected_by_its_unanswered_connections_and_replaced(sleepers: System, figure: Figure) -> None:
    sleepers.up("3", *FAST, "--min", "3", "--health", "tcp")
    victim = sleepers.active()[0]
    load = Load(sleepers.port, seconds=150, per_second=50)
    time.sleep(5)  # past the slow start
    process = int(docker("inspect", "-f", "{{.State.Pid}}", victim["name"]))
    os.kill(process, signal.SIGSTOP)
    began = time.time()
    wait_until(
        lambda: any(at > began and victim["ip"] not in found for at, found in rotations(sleepers)),
        "the frozen one is out of rotation",
        60,
    )
    out_after = time.time() - began
    why = wait_until(lambda: why_of(sleepers, victim["name"]), "the cause is reported", 10)
    assert "first reply" in why
    wait_until(lambda: victim["name"] not in {b["name"] for b in sleepers.active()}, "it is replaced", 40)
    answered, others, _ = load.stop()
    figure(f"one of three frozen: out of rotation after {out_after:.1f} s, {others} of {answered + others} failed")
    assert out_after < 50
    # A third of what came until it was out of rotation; those in flight on it are lost.
    assert others < 50 * out_after / 3 * 1.5 + 10


def why_of(system: System, name: str) -> str:
    return next((b["why"] or b["reason"] for b in system.status()["backends"] if b["name"] == name), "")
