"""Three nodes, each a real engine in a namespace of its own: a Swarm that loses nodes or balancers."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkout import copy_tree
from swarm.cluster import REGISTRY, Cluster, Load, Node, System, answering_backend, lost_in_flight, node_id
from swarm.conftest import image_of
from waiting import wait_until

Figure = Callable[[str], None]


def addresses(rows: list[dict[str, str]], node_id: str) -> set[str]:
    return {row["ip"] for row in rows if row["node"] == node_id}


def ejected(system: System, gone: set[str], nodes: list[Node]) -> bool:
    return all(not system.rotation(node) & gone for node in nodes)


@pytest.mark.parametrize("how", ["cut", "kill_engine"])
def test_lost_node_is_ejected_before_swarm_notices_and_returns_without_duplicates(
    cluster: Cluster, system: System, how: str, figure: Figure
) -> None:
    first, second, third = cluster.nodes
    system.scale(min=6, max=6)  # a node that was away has no backends; new ones are placed there
    rows, third_id = system.wait_for_active(6), node_id(third)
    gone = addresses(rows, third_id)
    assert gone
    load = Load(cluster, second, seconds=12, per_second=30)
    time.sleep(1)
    getattr(third, how)()
    try:
        began = time.monotonic()
        wait_until(lambda: ejected(system, gone, [first, second]), "out of every rotation", 30)
        took = time.monotonic() - began
        noticed = first.try_docker("node", "inspect", "--format", "{{.Status.State}}", third_id)
        answered, others = load.result()
        lost = lost_in_flight(others)
        figure(
            f"Swarm, a node lost ({how}): out of every rotation after {took:.1f} s, when Swarm still called it "
            f"{noticed}; of {answered + lost} requests to another node {lost} were open there, and lost"
        )
        assert noticed == "ready"
        wait_until(lambda: len({r["ip"] for r in system.active()} - gone) >= 6, "Swarm's replacements are in", 90)
    finally:
        third.reconnect()
        if how == "kill_engine":
            third.start_engine()
    wait_until(cluster.whole, "it is back", 90)
    system.wait_for_active(6)
    assert system.replicas() == 6


def serving(nodes: list[Node]) -> list[bool]:
    """Whether each node serves, asked at the same time: one without a balancer may take seconds to say so."""
    with ThreadPoolExecutor() as pool:
        return list(map(bool, pool.map(answering_backend, nodes)))


def test_removed_balancer_service_is_created_again(cluster: Cluster, system: System, figure: Figure) -> None:
    system.wait_for_active(3)
    began = time.monotonic()
    system.node.docker("service", "rm", f"{system.project}-balancer")
    wait_until(lambda: not any(serving(cluster.nodes)), "none serves", 30)
    wait_until(lambda: all(serving(cluster.nodes)), "every node serves again", 60)
    figure(f"Swarm, the balancers' service removed: every node served again {time.monotonic() - began:.1f} s later")
    system.wait_for_active(3)


def fewest_serving(cluster: Cluster, system: System, *flags: str) -> int:
    """Runs run.sh, and counts the nodes that serve until every node has a new balancer."""

    def tasks() -> set[str]:
        listed = ("service", "ps", "-q", "--filter", "desired-state=running", f"{system.project}-balancer")
        return set(system.node.docker(*listed).split())

    before, fewest = tasks(), 3
    system.up(*flags)
    deadline = time.monotonic() + 120
    while tasks() & before or not all(serving(cluster.nodes)):
        fewest = min(fewest, sum(serving(cluster.nodes)))
        assert time.monotonic() < deadline, "the update does not end"
    return fewest


def test_balancer_update_keeps_two_of_three_nodes_serving(cluster: Cluster, system: System, figure: Figure) -> None:
    system.wait_for_active(3)
    fewest = fewest_serving(cluster, system, "--drain-timeout", "4")
    figure(f"Swarm, balancers updated: at least {fewest} of 3 nodes served at any time")
    assert fewest >= 2
    system.up("--drain-timeout", "8")
    wait_until(lambda: all(serving(cluster.nodes)), "every node serves", 90)


def status_of_a_call(node: Node, token: str, certificate: Path) -> str:
    """The HTTP status of a balancer's call, 000 if the manager has another certificate."""
    call = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", str(certificate)]
    call += ["--connect-to", f"lbscaler-manager:5000:{node.ip}:5000", "-H", f"Host: {node.ip}"]
    call += ["-H", f"Authorization: Bearer {token}"]
    call += ["-d", '{"ip": "198.18.255.254", "reason": "a test"}', "https://lbscaler-manager:5000/stop"]
    return subprocess.run(node.namespace_command(*call), capture_output=True, text=True, check=False).stdout


@pytest.mark.paired  # without processor time, a node that serves may not answer in time
def test_rotated_token_and_certificate_reach_every_balancer_while_two_of_three_nodes_serve(
    cluster: Cluster, system: System, tmp_path: Path, figure: Figure
) -> None:
    system.wait_for_active(3)
    token, certificate = (system.run_dir / "token").read_text(), system.run_dir / "certificate.pem"
    old_certificate = Path(shutil.copy(certificate, tmp_path))
    assert status_of_a_call(system.node, token, certificate) == "404", "there is no such backend"
    fewest = fewest_serving(cluster, system, "--rotate-secrets")
    figure(f"Swarm, secrets rotated: at least {fewest} of 3 nodes served at any time")
    assert fewest >= 2
    system.wait_for_active(3)  # every balancer reports
    new = (system.run_dir / "token").read_text()
    assert status_of_a_call(system.node, token, certificate) == "401"
    assert status_of_a_call(system.node, new, old_certificate) == "000"
    assert status_of_a_call(system.node, new, certificate) == "404"
    secrets = system.node.docker("secret", "ls", "-q", "--filter", f"label=lbscaler.project={system.project}")
    assert len(secrets.split()) == 3, "the old ones are removed"


@pytest.fixture
def elsewhere(cluster: Cluster, system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The same project's files on another node, where the manager has never run."""
    place = copy_tree(tmp_path_factory.mktemp("node2") / "another checkout")
    shutil.copytree(system.tree / ".venv", place / ".venv", symlinks=True)
    second = cluster.nodes[1]
    second.run("docker", "pull", system.node.docker("service", "inspect", "--format",
               "{{.Spec.TaskTemplate.ContainerSpec.Image}}", f"{system.project}-balancer"))  # fmt: skip
    for folder in ("balancer", "server"):
        second.pull(image_of(place, folder))
    made = System(cluster, second, place)
    yield made
    made.end_manager()


@pytest.mark.paired  # without processor time, Swarm's agents do not find its new leader
def test_another_node_takes_over_when_the_manager_node_is_lost(
    cluster: Cluster, system: System, elsewhere: System, figure: Figure
) -> None:
    first, second, third = cluster.nodes
    system.wait_for_active(3)
    load = Load(cluster, third, seconds=15, per_second=30)
    first.cut()
    try:
        answered, others = load.result()
        lost = lost_in_flight(others)
        figure(f"Swarm, the manager's node lost: of {answered + lost} requests to another {lost} were lost with it")
        leading = ("node", "ls", "--format", "{{.ManagerStatus}}")
        wait_until(lambda: "Leader" in second.try_docker(*leading), "another leader")
        elsewhere.up(*System.FAST, "--registry", REGISTRY, "--min", "3", "--max", "9", "--target", "100000")
        elsewhere.wait_for_active(3, balancers=2)
        elsewhere.scale(min=4, max=4)
        elsewhere.wait_for_active(4, balancers=2)
    finally:
        first.reconnect()
    elsewhere.wait_for_active(4)
    wait_until(
        lambda: not Path(f"/proc/{system.manager_pid()}").exists(), "the manager that was cut off ends by itself", 30
    )
    assert "has taken over; this one ends" in system.log()
    # and back: the manager leaves this node as it would for an upgrade of it, and is started where it was
    elsewhere.end_manager()
    wait_until(lambda: not Path(f"/proc/{elsewhere.manager_pid()}").exists(), "it ended")
    # The images pushed from this node may have other digests, which is an update. A node that has just come back
    # refuses tasks for a while, so that update may be undone: its end is not part of this test.
    system.up(*System.FAST, "--registry", REGISTRY, "--no-wait")
    system.scale(min=3, max=3)
    system.wait_for_active(3)
