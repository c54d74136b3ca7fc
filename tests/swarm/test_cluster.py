"""Three nodes, each a real engine in a namespace of its own: what one Swarm has to do under load and under loss."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import copy_tree, until
from swarm.cluster import REGISTRY, Cluster, Load, Node, System, lost_in_hand, sh, within
from swarm.conftest import image_of

Figure = Callable[[str], None]


def who(node: Node) -> str:
    return node.get(f"http://{node.ip}:8000/").split(" ")[0]


def addresses(rows: list[dict[str, str]], node_id: str) -> set[str]:
    return {row["ip"] for row in rows if row["node"] == node_id}


def node_id(node: Node) -> str:
    return node.docker("info", "--format", "{{.Swarm.NodeID}}")


def test_every_node_serves_and_the_reports_add_up(cluster: Cluster, system: System) -> None:
    rows = system.settled(3)
    assert len({row["node"] for row in rows}) == 3
    before = sum(row["connections"] for row in rows)
    seen: set[str] = set()
    for node in cluster.nodes:
        answers = {who(node) for _ in range(20)}
        assert "" not in answers
        seen |= answers
    assert len(seen) == 3
    until(lambda: sum(row["connections"] for row in system.active()) == before + 60, "60 connections more in all")


def test_the_services_are_what_was_asked_for(system: System) -> None:
    backend = f"{system.project}-backend"

    def told(service: str, template: str) -> str:
        return system.node.docker("service", "inspect", "--format", template, service)

    assert told(backend, "{{.Spec.EndpointSpec.Mode}}") == "dnsrr"
    container = "{{with .Spec.TaskTemplate.ContainerSpec}}{{.StopGracePeriod}} {{.ReadOnly}} {{.CapabilityDrop}}{{end}}"
    assert told(backend, container) == "8s true [ALL]"
    assert told(f"{system.project}-balancer", "{{.Spec.Mode.Global}}") == "{}"
    port = "{{range .Spec.EndpointSpec.Ports}}{{.PublishMode}} {{.PublishedPort}}{{end}}"
    assert told(f"{system.project}-balancer", port) == "host 8000"
    added = "{{.Spec.TaskTemplate.ContainerSpec.CapabilityAdd}}"
    assert told(f"{system.project}-balancer", added) == "[CAP_NET_ADMIN CAP_NET_RAW]"


def test_three_to_nine_to_three_under_load_fails_no_request(cluster: Cluster, system: System, figure: Figure) -> None:
    loads = [Load(cluster, node, seconds=40, per_second=30) for node in cluster.nodes]
    time.sleep(2)
    began = time.monotonic()
    system.scale(min=9, max=9)
    system.settled(9)
    grown = time.monotonic() - began
    time.sleep(2)
    system.scale(min=3, max=3)
    system.settled(3)
    results = [load.result() for load in loads]
    others = [line for _, lines in results for line in lines]
    answered = sum(count for count, _ in results)
    figure(
        f"Swarm, 3→9→3 on three nodes at 90 connections/s: {len(others)} of {answered} failed; 3→9 took {grown:.1f} s"
    )
    assert others == []
    assert answered > 2500
    assert "the engine is stopping its container" in system.log()


def test_somebody_elses_update_in_between_is_met_with_another_look(system: System) -> None:
    meddling = subprocess.Popen(
        ["/bin/bash", "-c", "for i in $(seq 30); do docker service update -d --label-add n=$i lbscaler-backend; done"],
        env=system.node.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for count in (4, 5, 6, 3):
            system.scale(min=count, max=count)
            until(lambda count=count: system.replicas() == count, f"{count} replicas", 20)
    finally:
        meddling.wait(60)
    system.settled(3)


def test_a_balancer_prefers_its_own_node_when_told_to(cluster: Cluster, system: System) -> None:
    system.up("--locality", "prefer")
    try:
        system.settled(3)
        for node in cluster.nodes:
            near = node.docker("ps", "-q", "--filter", "label=lbscaler.role=backend").split()

            def mostly_near(node: Node = node, near: list[str] = near) -> bool:
                return sum(who(node) in near for _ in range(12)) >= 7

            assert not near or until(mostly_near, f"most of {node.name}'s stay near", 30)
        # and what is far still gets some
        far = sum(who(cluster.nodes[0]) != who(cluster.nodes[0]) for _ in range(30))
        assert far > 0
    finally:
        system.up("--locality", "")


def test_a_rolling_update_is_swarms_and_fails_no_request(cluster: Cluster, system: System, figure: Figure) -> None:
    before = {row["name"] for row in system.settled(3)}
    loads = [Load(cluster, node, seconds=35, per_second=20) for node in cluster.nodes[:2]]
    system.up("--env", "COLOUR=blue")
    until(lambda: not before & {row["name"] for row in system.status()["backends"]}, "all replaced", 90)
    system.settled(3)
    results = [load.result() for load in loads]
    others = [line for _, lines in results for line in lines]
    figure(f"Swarm, rolling update of three at 40 connections/s: {len(others)} of {sum(n for n, _ in results)} failed")
    assert others == []
    backend = system.node.docker("ps", "-q", "--filter", "label=lbscaler.role=backend").split()[0]
    assert system.node.docker("exec", backend, "printenv", "COLOUR") == "blue"


def test_an_update_that_cannot_work_is_taken_back_and_not_tried_again(system: System) -> None:
    before = {row["name"] for row in system.settled(3)}
    system.up("--memory", "7m")  # too little to live
    state = ["service", "inspect", "--format", "{{with .UpdateStatus}}{{.State}}{{end}}", f"{system.project}-backend"]
    until(lambda: system.node.docker(*state) == "rollback_completed", "Swarm goes back", 120)
    time.sleep(3)
    assert system.node.docker(*state) == "rollback_completed"
    kept = {row["name"] for row in system.settled(3)}
    assert len(kept & before) >= 2
    system.up("--memory", "256m")
    system.settled(3)


def test_a_killed_manager_takes_over_what_runs(system: System) -> None:
    before, pid = {row["name"] for row in system.settled(3)}, system.manager_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: system.manager_pid() != pid and system.status()["backends"], "the manager is back", 20)
    assert {row["name"] for row in system.settled(3)} == before


def test_who_listens_between_the_nodes_learns_nothing_that_opens_a_door(cluster: Cluster, system: System) -> None:
    system.settled(3)
    token = (system.run_dir / "token").read_text().strip()

    def listen() -> bytes:
        heard = b""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as ear:
            ear.bind((cluster.nodes[1].link, 0))
            ear.settimeout(1)
            end = time.monotonic() + 6
            while time.monotonic() < end:
                try:
                    heard += ear.recv(65535)
                except TimeoutError:
                    continue
        return heard

    heard = within(cluster.fabric, listen)
    port = (5000).to_bytes(2, "big")
    assert port in heard, "the reports went by"
    for secret in (token.encode(), b"Bearer", b"pkts_info", system.settled(3)[0]["name"].encode()):
        assert secret not in heard
    door = f"{cluster.nodes[0].ip}:5000"
    assert cluster.nodes[1].get(f"http://{door}/status") == ""  # plain HTTP is not answered
    refused = cluster.nodes[1].run("curl", "-sk", f"https://{door}/status")
    assert "needs the token" in refused
    told = cluster.nodes[1].run("curl", "-sk", "-H", f"Authorization: Bearer {token}", f"https://{door}/status")
    assert '"desired":3' in told
    # whoever is not the manager is not believed
    unknown = cluster.nodes[1].run("curl", "-s", f"https://{door}/status", status=60)
    assert unknown == ""


def away(system: System, cluster: Cluster, gone: set[str], nodes: list[Node]) -> bool:
    return all(not system.rotation(node) & gone for node in nodes)


@pytest.mark.parametrize("how", ["cut", "kill_engine"])
def test_a_lost_node_leaves_every_rotation_before_swarm_notices_and_comes_back_without_doubles(
    cluster: Cluster, system: System, how: str, figure: Figure
) -> None:
    first, second, third = cluster.nodes
    system.scale(min=6, max=6)  # who was away and is back has none: new ones go there
    rows, third_id = system.settled(6), node_id(third)
    gone = addresses(rows, third_id)
    assert gone
    load = Load(cluster, second, seconds=12, per_second=30)
    time.sleep(1)
    getattr(third, how)()
    try:
        began = time.monotonic()
        until(lambda: away(system, cluster, gone, [first, second]), "out of every rotation", 30)
        took = time.monotonic() - began
        noticed = first.try_docker("node", "inspect", "--format", "{{.Status.State}}", third_id)
        answered, others = load.result()
        lost = lost_in_hand(others)
        figure(
            f"Swarm, a node lost ({how}): out of every rotation after {took:.1f} s, when Swarm still called it "
            f"{noticed}; of {answered + lost} requests to another node {lost} were in its hands, and lost"
        )
        assert noticed == "ready"
        until(lambda: len({r["ip"] for r in system.active()} - gone) >= 6, "Swarm's replacements are in", 90)
    finally:
        third.mend()
        if how == "kill_engine":
            third.start_engine()
    until(cluster.whole, "it is back", 90)
    system.settled(6)
    assert system.replicas() == 6


def serving(nodes: list[Node]) -> list[bool]:
    return [bool(who(node)) for node in nodes]


def test_balancers_are_created_again_where_somebody_removed_their_service(
    cluster: Cluster, system: System, figure: Figure
) -> None:
    system.settled(3)
    began = time.monotonic()
    system.node.docker("service", "rm", f"{system.project}-balancer")
    until(lambda: not any(serving(cluster.nodes)), "none serves", 30)
    until(lambda: all(serving(cluster.nodes)), "every node serves again", 60)
    figure(f"Swarm, the balancers' service removed: every node served again {time.monotonic() - began:.1f} s later")
    system.settled(3)


def test_changed_balancers_are_updated_one_node_at_a_time(cluster: Cluster, system: System, figure: Figure) -> None:
    system.settled(3)

    def tasks() -> set[str]:
        listed = ("service", "ps", "-q", "--filter", "desired-state=running", f"{system.project}-balancer")
        return set(system.node.docker(*listed).split())

    before, fewest = tasks(), 3
    system.up("--drain-timeout", "4")
    deadline = time.monotonic() + 120
    while tasks() & before or not all(now := serving(cluster.nodes)):
        fewest = min(fewest, sum(serving(cluster.nodes)))
        assert time.monotonic() < deadline, "the update does not end"
    figure(f"Swarm, balancers updated: at least {fewest} of 3 nodes served at any time")
    assert fewest >= 2
    assert len(now) == 3
    system.up("--drain-timeout", "8")
    until(lambda: all(serving(cluster.nodes)), "every node serves", 90)


@pytest.fixture
def elsewhere(cluster: Cluster, system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The same project's files on another node, where the manager has never run."""
    place = copy_tree(tmp_path_factory.mktemp("node2") / "another checkout")
    shutil.copytree(system.tree / ".venv", place / ".venv", symlinks=True)
    second = cluster.nodes[1]
    second.run("docker", "pull", system.node.docker("service", "inspect", "--format",
               "{{.Spec.TaskTemplate.ContainerSpec.Image}}", f"{system.project}-balancer"))  # fmt: skip
    for folder in ("balancer", "server"):
        tag = image_of(place, folder)
        second.docker("pull", f"{REGISTRY}/{tag}")
        second.docker("tag", f"{REGISTRY}/{tag}", tag)
    yield System(cluster, second, place)


def test_the_managers_node_is_lost_traffic_goes_on_and_another_node_takes_over(
    cluster: Cluster, system: System, elsewhere: System, figure: Figure
) -> None:
    first, second, third = cluster.nodes
    system.settled(3)
    load = Load(cluster, third, seconds=15, per_second=30)
    first.cut()
    try:
        answered, others = load.result()
        lost = lost_in_hand(others)
        figure(f"Swarm, the manager's node lost: of {answered + lost} requests to another {lost} were lost with it")
        leading = ("node", "ls", "--format", "{{.ManagerStatus}}")
        until(lambda: "Leader" in second.try_docker(*leading), "another leader")
        elsewhere.up(*System.FAST, "--registry", REGISTRY, "--min", "3", "--max", "9", "--target", "100000")
        elsewhere.settled(3, balancers=2)
        elsewhere.scale(min=4, max=4)
        elsewhere.settled(4, balancers=2)
    finally:
        first.mend()
    elsewhere.settled(4)
    until(lambda: not Path(f"/proc/{system.manager_pid()}").exists(), "the manager that was cut off ends by itself", 30)
    assert "has taken over; this one ends" in system.log()
    # and back: the manager leaves this node as it would for an upgrade of it, and is started where it was
    for name in ("supervisor", "manager"):
        os.kill(int((elsewhere.run_dir / f"{name}.pid").read_text()), signal.SIGTERM)
    until(lambda: not Path(f"/proc/{(elsewhere.run_dir / 'manager.pid').read_text().strip()}").exists(), "it ended")
    system.up(*System.FAST, "--registry", REGISTRY)
    system.scale(min=3, max=3)
    system.settled(3)


def test_what_a_swarm_needs_and_has_not_is_told_before_anything_is_touched(cluster: Cluster, tree: Path) -> None:
    until(cluster.whole, "every node is there", 90)
    system = System(cluster, cluster.nodes[0], tree)
    told = system.up("--project", "other", "--port", "8001", "--manager-port", "5001", "--registry", "", status=1)
    assert "the Swarm has 3 nodes, which need a registry to get the images from: --registry HOST:PORT" in told
    told = system.up("--project", "other", "--spares", "1", status=2)
    assert "--spares, --preserve-client-ip and --bind are for --orchestrator docker" in told
    until(cluster.whole, "every node is there", 90)
    cluster.nodes[2].docker("node", "demote", node_id(cluster.nodes[2]))
    try:
        worker = System(cluster, cluster.nodes[2], tree)
        until(lambda: cluster.nodes[2].docker("info", "--format", "{{.Swarm.ControlAvailable}}") == "false", "a worker")
        told = worker.up("--project", "other", "--registry", REGISTRY, status=1)
        assert "this node is a worker of its Swarm; run on a manager of it, or: docker node promote" in told
    finally:
        cluster.nodes[0].docker("node", "promote", node_id(cluster.nodes[2]))


def test_one_host_becomes_a_swarm_of_one_when_asked_to_and_needs_no_registry(cluster: Cluster, tree: Path) -> None:
    alone = Node(cluster, 9)
    try:
        alone.start_engine()
        images = " ".join(image_of(tree, folder) for folder in ("balancer", "server"))
        sh(f"docker save {images} | docker --host unix://{alone.socket} load")
        system = System(cluster, alone, tree, "alone")
        told = system.up("--project", "alone", *System.FAST, status=1)
        assert "this host is in no Swarm; join one as a manager, or make one with --swarm-init" in told
        system.up("2", *System.FAST, "--swarm-init", "--advertise", alone.ip)
        system.settled(2, balancers=1)
        assert len({who(alone) for _ in range(20)}) == 2
        system.down()
    finally:
        alone.close()


def test_stop_leaves_nothing_on_any_node(cluster: Cluster, running: System) -> None:
    running.scale(min=3, max=3)
    running.settled(3)
    load = Load(cluster, cluster.nodes[1], seconds=4, per_second=30)
    time.sleep(5)
    load.result()
    running.down()
    for node in cluster.nodes:
        until(lambda node=node: not node.docker("ps", "-aq", "--filter", f"label=lbscaler.project={running.project}"),
              f"no container left on {node.name}", 30)  # fmt: skip
    assert running.node.docker("service", "ls", "-q") == ""
    assert running.node.docker("secret", "ls", "-q") == ""
    network = ("network", "ls", "-q", "--filter", f"label=lbscaler.project={running.project}")
    until(lambda: not running.node.docker(*network), "no network left")
    assert "lbscaler.manager" not in running.node.docker("node", "inspect", "self")
