"""The same tests for both engines, each against a real one: what the controller relies on holds for both.

No balancers run here. The test sends their reports: every backend is healthy, every draining backend has drained.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from core.controller import Controller
from core.engine import EngineError
from core.load import Report, Sample
from engines.docker_engine import DockerEngine
from engines.options import BalancerOptions
from engines.swarm_engine import SwarmEngine
from fakes import settings
from swarm.cluster import Cluster, Node
from swarm.conftest import image_of, open_cluster, prepared_tree
from waiting import wait_until
from web.metrics import Tally

ENGINES = {"docker": DockerEngine, "swarm": SwarmEngine}
SUBNETS = {"docker": "198.19.192.0/24", "swarm": "198.19.196.0/24"}


class Driven:
    def __init__(self, kind: str, node: Node, image: str, place: Path, **changes: object) -> None:
        self.node, self.project, self.kind = node, f"conform-{kind}", kind
        self._made = (image, place)
        self.settings = settings(
            project=self.project, orchestrator=kind, image=image, min=1, max=5, target=1e6, interval=0.5,
            panic_window=1, drain_timeout=4, constraint=f"node.hostname=={node.name}", **changes,
        )  # fmt: skip
        self.engine = ENGINES[kind](self.settings, BalancerOptions("none"))
        self.engine._note_balancers = lambda *_: None  # no balancers run here
        self.controller = Controller(self.engine, self.settings, place / "ip.txt", Tally())
        self.snapshots: list[dict[str, str]] = []  # id → state, as a balancer receives it
        self.controller.adopt(None)

    def again(self, **changes: object) -> Driven:
        """Another manager of the same project, as after a restart."""
        self.close()
        return Driven(self.kind, self.node, *self._made, **changes)

    def close(self) -> None:
        self.controller.close()
        self.engine._client.close()  # Docker's client leaves its connections to the collector

    def turn(self) -> None:
        """One pass, and the reports of balancers after it."""
        self.controller.step()
        snapshot = self.controller.wait_for_snapshot("", 0)
        assert snapshot is not None
        self.snapshots.append({b["id"]: b["state"] for b in snapshot["backends"]})
        samples = {b["ip"]: Sample(0, 0, 0, 0, True, id=b["id"]) for b in snapshot["backends"]}
        self.controller.report(Report("b1", snapshot["revision"], 0.5, samples))
        for backend in snapshot["backends"]:
            if backend["state"] == "draining":
                self.controller.stop(backend["ip"], "drained")

    def is_own(self, ip: str) -> bool:
        """Whether the address is one of the project's network."""
        return IPv4Address(ip) in IPv4Network(SUBNETS[self.kind])

    def active(self) -> dict[str, str]:
        """Name → address of the ready ones."""
        return {b["name"]: b["ip"] for b in self.rows() if b["state"] == "active" and b["healthy"]}

    def rows(self) -> list[dict[str, Any]]:
        return list(self.controller.status()["backends"])

    def turn_until(self, condition: Callable[[], Any], what: str) -> None:
        wait_until(lambda: (self.turn(), condition())[1], what, 60)

    def scale(self, count: int) -> None:
        self.controller.scale(count, count, None)
        self.turn_until(lambda: len(self.active()) == count == len(self.rows()), f"{count} and no others")
        wait_until(lambda: len(self.containers()) == count, "they run")

    def containers(self) -> list[str]:
        return self.node.docker("ps", "-q", "--no-trunc", "--filter", f"label=lbscaler.project={self.project}").split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster(1) as made:
        yield made


@pytest.fixture(scope="module")
def tree(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_tree(cluster, tmp_path_factory)


@pytest.fixture(params=["docker", "swarm"])
def driven(
    request: pytest.FixtureRequest, cluster: Cluster, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Driven]:
    node = cluster.nodes[0]
    monkeypatch.setenv("DOCKER_HOST", f"unix://{node.socket}")
    kind, project = request.param, f"conform-{request.param}"
    image = image_of(tree, "server")
    how = ["--driver", "overlay"] if kind == "swarm" else []
    # Swarm removes a network a moment after the command, so the two kinds do not share a subnet.
    node.docker("network", "create", *how, "--subnet", SUBNETS[kind], project)
    ours = f"--filter label=lbscaler.project={project}"
    try:
        made = Driven(kind, node, image, tmp_path)
        yield made
        made.close()
    finally:
        if kind == "swarm":
            node.run("/bin/sh", "-c", f"docker service rm {project}-backend || true")

        def gone() -> str:
            remove = f"docker ps -aq {ours} | xargs -r docker rm -f; docker network rm {project} && echo gone || true"
            return node.run("/bin/sh", "-c", remove).rpartition("\n")[2]

        wait_until(lambda: gone() == "gone", "no container and no network left")


@pytest.fixture
def neighbours(cluster: Cluster) -> Iterator[None]:
    """A network for each engine; it is removed after the backends are."""
    node = cluster.nodes[0]
    node.docker("network", "create", "--subnet", "198.19.193.0/24", "a-database-docker")
    node.docker("network", "create", "--driver", "overlay", "--subnet", "198.19.194.0/24", "a-database-swarm")
    yield
    node.docker("network", "rm", "a-database-docker", "a-database-swarm")


def test_backend_has_another_network_a_secret_and_the_variables_of_its_file(
    neighbours: None, driven: Driven, tmp_path: Path
) -> None:
    secret, env_file = tmp_path / "0123-10001", tmp_path / "a.env"
    secret.write_text("hunter2")
    secret.chmod(0o400)
    os.chown(secret, 10001, 10001)  # the copies that run.sh makes
    env_file.write_text("A=file\nB=file\n")
    if driven.kind == "swarm":
        labels = ["--label", f"lbscaler.project={driven.project}"]
        driven.node.docker("secret", "create", *labels, f"{driven.project}-{secret.name}", str(secret))
    after = driven.again(
        attach=f"a-database-{driven.kind}", env="B=flag", env_file=str(env_file), secret=f"key={secret}",
        add_host="db:198.19.195.1", label="tier=web", ulimit="nofile=2000", allow="processes",
    )  # fmt: skip
    after.scale(1)
    (container,) = driven.containers()
    assert all(driven.is_own(ip) for ip in after.active().values()), "that of the project's network"
    reads = "cat /run/secrets/key; stat -c ' %a %u ' /run/secrets/key; echo $A $B; ulimit -n; grep -w db /etc/hosts"
    text = driven.node.docker("exec", container, "sh", "-c", reads)
    assert text.split() == ["hunter2", "400", "10001", "file", "flag", "2000", "198.19.195.1", "db"]
    networks = json.loads(driven.node.docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", container))
    assert {driven.project, f"a-database-{driven.kind}"} <= networks.keys()
    assert driven.node.docker("inspect", "-f", "{{.Config.Labels.tier}}", container) == "web"
    after.close()


def test_scale_out_reaches_the_desired_count_with_distinct_addresses(driven: Driven) -> None:
    driven.scale(3)
    assert len(set(driven.active().values())) == 3
    assert all(driven.is_own(ip) for ip in driven.active().values())
    assert len(driven.containers()) == 3
    assert {container.spec for container in driven.engine.list()} == {driven.engine.spec()}


def test_backend_drains_in_the_snapshot_before_its_container_stops(driven: Driven) -> None:
    driven.scale(3)
    driven.snapshots.clear()
    driven.scale(1)
    assert len(driven.containers()) == 1
    gone = driven.snapshots[0].keys() - driven.snapshots[-1].keys()
    assert len(gone) == 2
    for id_ in gone:
        states = [snapshot[id_] for snapshot in driven.snapshots if id_ in snapshot]
        assert states == sorted(states), "first active, then draining"
        assert states[-1] == "draining"


def test_killed_container_is_logged_with_its_exit_code_and_replaced(
    driven: Driven, caplog: pytest.LogCaptureFixture
) -> None:
    driven.scale(2)
    before = driven.active()
    driven.node.docker("kill", driven.containers()[0])
    with caplog.at_level("WARNING"):
        driven.turn_until(lambda: len(driven.active().keys() & before.keys()) < 2, "the failure is noticed")
        driven.turn_until(lambda: len(driven.active()) == 2 == len(driven.rows()), "it is replaced")
    assert any("its container ended with exit code" in line for line in caplog.messages)
    wait_until(lambda: len(driven.containers()) == 2, "both run")


def test_new_manager_keeps_the_backends_of_its_predecessor(driven: Driven) -> None:
    driven.scale(3)
    before, containers = driven.active(), set(driven.containers())
    after = driven.again()
    assert after.controller.desired == 3
    for _ in range(5):
        after.turn()
    assert after.active() == before
    assert set(driven.containers()) == containers
    after.close()


def test_changed_options_replace_all_and_keep_the_desired_number_active(driven: Driven) -> None:
    driven.scale(2)
    before = driven.active().keys()
    after = driven.again(env="NEW=1")
    fewest = 2

    def replaced() -> bool:
        nonlocal fewest
        fewest = min(fewest, len(after.active()))
        return not after.active().keys() & before and len(after.active()) == 2 == len(after.rows())

    wait_until(lambda: (after.turn(), replaced())[1], "both replaced", 90)
    assert fewest == 2
    environments = [driven.node.docker("inspect", "-f", "{{json .Config.Env}}", id_) for id_ in driven.containers()]
    assert all("NEW=1" in json.loads(text) for text in environments)
    after.close()


def test_killed_container_sends_an_event(driven: Driven) -> None:
    driven.scale(1)
    received: list[str] = []
    listening = threading.Event()

    def listen() -> None:
        for event in driven.engine.events():
            if listening.is_set():
                received.append(event.action)
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    time.sleep(1)  # it has begun
    listening.set()
    driven.node.docker("kill", driven.containers()[0])
    listener.join(20)
    assert received


@pytest.mark.filterwarnings(
    "ignore:unclosed <socket:ResourceWarning"
)  # the SDK leaves sockets that could not connect open
def test_unreachable_engine_is_an_error_and_the_backends_stay(driven: Driven) -> None:
    driven.scale(2)
    before = driven.active()
    socket = driven.node.socket
    socket.rename(socket.with_suffix(".away"))
    driven.engine._client.close()  # or it would go on with connections it has
    try:
        with pytest.raises(EngineError):
            driven.engine.list()
        driven.controller.step()
        assert driven.controller.status()["engine"] != "ok"
        assert driven.active() == before
    finally:
        socket.with_suffix(".away").rename(socket)
    driven.turn()
    assert driven.controller.status()["engine"] == "ok"
    gc.collect()  # here, where that warning is expected, and not amid another test
