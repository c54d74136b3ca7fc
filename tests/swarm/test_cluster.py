"""Three nodes, each a real engine in a namespace of its own: a Swarm under load, its updates, and the commands."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from swarm.cluster import REGISTRY, Cluster, Load, Node, System, answering_backend, in_namespace, node_id
from swarm.conftest import image_of
from waiting import wait_until

Figure = Callable[[str], None]


def test_every_node_serves_and_the_reported_connections_add_up(cluster: Cluster, system: System) -> None:
    rows = system.wait_for_active(3)
    assert len({row["node"] for row in rows}) == 3
    before = sum(row["connections"] for row in rows)
    seen: set[str] = set()
    for node in cluster.nodes:
        answers = {answering_backend(node) for _ in range(20)}
        assert "" not in answers
        seen |= answers
    assert len(seen) == 3
    wait_until(lambda: sum(row["connections"] for row in system.active()) == before + 60, "60 connections more in all")


def test_services_have_the_requested_options(system: System) -> None:
    backend = f"{system.project}-backend"

    def inspect(service: str, template: str) -> str:
        return system.node.docker("service", "inspect", "--format", template, service)

    assert inspect(backend, "{{.Spec.EndpointSpec.Mode}}") == "dnsrr"
    container = "{{with .Spec.TaskTemplate.ContainerSpec}}{{.StopGracePeriod}} {{.ReadOnly}} {{.CapabilityDrop}}{{end}}"
    assert inspect(backend, container) == "8s true [ALL]"
    assert inspect(f"{system.project}-balancer", "{{.Spec.Mode.Global}}") == "{}"
    port = "{{range .Spec.EndpointSpec.Ports}}{{.PublishMode}} {{.PublishedPort}}{{end}}"
    assert inspect(f"{system.project}-balancer", port) == "host 8000"
    added = "{{.Spec.TaskTemplate.ContainerSpec.CapabilityAdd}}"
    assert inspect(f"{system.project}-balancer", added) == "[CAP_NET_ADMIN CAP_NET_RAW]"


def test_scaling_from_three_to_nine_to_three_under_load_fails_no_request(
    cluster: Cluster, system: System, figure: Figure
) -> None:
    loads = [Load(cluster, node, seconds=240, per_second=15) for node in cluster.nodes]
    time.sleep(2)
    began = time.monotonic()
    system.scale(min=9, max=9)
    system.wait_for_active(9)
    grown = time.monotonic() - began
    time.sleep(2)
    system.scale(min=3, max=3)
    system.wait_for_active(3)
    results = [load.stop() for load in loads]
    others = [line for _, lines in results for line in lines]
    answered = sum(count for count, _ in results)
    figure(
        f"Swarm, 3→9→3 on three nodes at 45 connections/s: {len(others)} of {answered} failed; 3→9 took {grown:.1f} s"
    )
    assert others == []
    assert answered > 300
    assert "the engine is stopping its container" in system.log()


def test_scaling_is_retried_when_another_client_updates_the_service(system: System) -> None:
    other_updates = subprocess.Popen(
        ["/bin/bash", "-c", "for i in $(seq 30); do docker service update -d --label-add n=$i lbscaler-backend; done"],
        env=system.node.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for count in (4, 5, 6, 3):
            system.scale(min=count, max=count)
            wait_until(lambda count=count: system.replicas() == count, f"{count} replicas", 20)
    finally:
        other_updates.wait(60)
    system.wait_for_active(3)


def test_balancer_prefers_backends_of_its_node_with_locality_prefer(cluster: Cluster, system: System) -> None:
    system.up("--locality", "prefer")
    try:
        system.wait_for_active(3)
        for node in cluster.nodes:
            near = node.docker("ps", "-q", "--filter", "label=lbscaler.role=backend").split()

            def mostly_near(node: Node = node, near: list[str] = near) -> bool:
                return sum(answering_backend(node) in near for _ in range(12)) >= 7

            assert not near or wait_until(mostly_near, f"most of {node.name}'s stay near", 30)
        # other nodes' backends still get some
        far = sum(answering_backend(cluster.nodes[0]) != answering_backend(cluster.nodes[0]) for _ in range(30))
        assert far > 0
    finally:
        system.up("--locality", "")


def test_rolling_update_by_swarm_fails_no_request(cluster: Cluster, system: System, figure: Figure) -> None:
    before = {row["name"] for row in system.wait_for_active(3)}
    loads = [Load(cluster, node, seconds=240, per_second=20) for node in cluster.nodes[:2]]
    system.up("--env", "COLOUR=blue")
    rows = system.status()["backends"]
    serving = {row["name"] for row in rows if row["state"] == "active"}
    assert (len(serving), serving & before) == (3, set()), "run.sh waits until all are replaced"
    system.wait_for_active(3)
    results = [load.stop() for load in loads]
    others = [line for _, lines in results for line in lines]
    figure(f"Swarm, rolling update of three at 40 connections/s: {len(others)} of {sum(n for n, _ in results)} failed")
    assert others == []
    colours = set()
    for node in cluster.nodes:
        for backend in node.docker("ps", "-q", "--filter", "label=lbscaler.role=backend").split():
            colours.add(node.docker("exec", backend, "printenv", "COLOUR"))
    assert colours == {"blue"}


def service_value(system: System, role: str, template: str) -> str:
    """A value of the service, by a template of Docker's."""
    return system.node.docker("service", "inspect", "--format", template, f"{system.project}-{role}")


def test_failed_update_is_undone_and_not_retried(system: System) -> None:
    spec = '{{index .Spec.Labels "lbscaler.spec"}}'
    before, spec_before = {row["name"] for row in system.wait_for_active(3)}, service_value(system, "backend", spec)
    system.up("--memory", "7m", "--no-wait")  # too little to start
    wait_until(lambda: system.status()["launches"]["update_given_up"], "the update is given up", 120)
    wait_until(lambda: service_value(system, "backend", spec) == spec_before, "the service has its old spec", 20)
    time.sleep(3)
    assert service_value(system, "backend", spec) == spec_before
    kept = {row["name"] for row in system.wait_for_active(3)}
    assert len(kept & before) >= 2
    system.up("--memory", "250m")  # the next good update is not refused
    assert not {row["name"] for row in system.wait_for_active(3)} & kept


def test_killed_manager_is_restarted_and_keeps_the_backends(system: System) -> None:
    before, pid = {row["name"] for row in system.wait_for_active(3)}, system.manager_pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: system.manager_pid() != pid and system.status()["backends"], "the manager is back", 20)
    assert {row["name"] for row in system.wait_for_active(3)} == before


def test_traffic_between_nodes_is_encrypted_and_the_manager_needs_the_token(cluster: Cluster, system: System) -> None:
    system.wait_for_active(3)
    token = (system.run_dir / "token").read_text().strip()

    def capture() -> bytes:
        captured = b""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as packets:
            packets.bind((cluster.nodes[1].link, 0))
            packets.settimeout(1)
            end = time.monotonic() + 6
            while time.monotonic() < end:
                try:
                    captured += packets.recv(65535)
                except TimeoutError:
                    continue
        return captured

    captured = in_namespace(cluster.fabric, capture)
    port = (5000).to_bytes(2, "big")
    assert port in captured, "no report was captured"
    for secret in (token.encode(), b"Bearer", b"pkts_info", system.wait_for_active(3)[0]["name"].encode()):
        assert secret not in captured
    manager = f"{cluster.nodes[0].ip}:5000"
    assert cluster.nodes[1].get(f"http://{manager}/status") == ""  # plain HTTP is not answered
    refused = cluster.nodes[1].run("curl", "-sk", f"https://{manager}/status")
    assert "needs the token" in refused
    output = cluster.nodes[1].run("curl", "-sk", "-H", f"Authorization: Bearer {token}", f"https://{manager}/status")
    assert '"desired":3' in output
    # a client that checks the certificate refuses an unknown one
    unknown = cluster.nodes[1].run("curl", "-s", f"https://{manager}/status", status=60)
    assert unknown == ""


def test_missing_swarm_prerequisites_are_reported_before_any_change(cluster: Cluster, tree: Path) -> None:
    wait_until(cluster.whole, "every node is there", 90)
    system = System(cluster, cluster.nodes[0], tree)
    output = system.up("--project", "other", "--port", "8001", "--manager-port", "5001", "--registry", "", status=1)
    assert "the Swarm has 3 nodes, which need a registry to get the images from: --registry HOST:PORT" in output
    output = system.up("--project", "other", "--spares", "1", status=2)
    assert "--spares, --datapath host and --bind are for --orchestrator docker" in output
    wait_until(cluster.whole, "every node is there", 90)
    cluster.nodes[2].docker("node", "demote", node_id(cluster.nodes[2]))
    try:
        worker = System(cluster, cluster.nodes[2], tree)
        wait_until(
            lambda: cluster.nodes[2].docker("info", "--format", "{{.Swarm.ControlAvailable}}") == "false", "a worker"
        )
        output = worker.up("--project", "other", "--registry", REGISTRY, status=1)
        assert "this node is a worker of its Swarm; run on a manager of it, or: docker node promote" in output
    finally:
        cluster.nodes[0].docker("node", "promote", node_id(cluster.nodes[2]))


def test_swarm_init_makes_a_one_node_swarm_without_a_registry(cluster: Cluster, tree: Path) -> None:
    alone = Node(cluster, 9)
    system = System(cluster, alone, tree, "alone")
    try:
        alone.start_engine()
        for folder in ("balancer", "server"):
            alone.pull(image_of(tree, folder))
        output = system.up("--project", "alone", *System.FAST, status=1)
        assert "this host is in no Swarm; join one as a manager, or make one with --swarm-init" in output
        system.up("2", *System.FAST, "--swarm-init", "--advertise", alone.ip)
        system.wait_for_active(2, balancers=1)
        assert len({answering_backend(alone) for _ in range(20)}) == 2
    finally:
        system.end_manager()
        alone.close()


def test_update_of_the_balancers_that_one_node_cannot_start_is_completed_when_it_can(
    cluster: Cluster, system: System
) -> None:
    system.wait_for_active(3)
    in_use = in_namespace(cluster.nodes[2].name, lambda: socket.create_server(("0.0.0.0", 8001)))
    with in_use:
        system.up("--publish", "8000:8000", "--publish", "8001:8000", "--no-wait")
        state = "{{with .UpdateStatus}}{{.State}}{{end}}"
        wait_until(lambda: service_value(system, "balancer", state) == "paused", "Swarm pauses the update", 240)
    for port in (8000, 8001):
        for node in cluster.nodes:
            url = f"http://{node.ip}:{port}/"
            wait_until(lambda node=node, url=url: node.get(url), f"{node.name} serves port {port}", 120)


def test_stop_removes_everything_from_every_node(cluster: Cluster, running: System) -> None:
    running.scale(min=3, max=3)
    running.wait_for_active(3)
    load = Load(cluster, cluster.nodes[1], seconds=4, per_second=30)
    time.sleep(5)
    load.result()
    running.down()
    containers = ("ps", "-aq", "--filter", f"label=lbscaler.project={running.project}")
    for node in cluster.nodes:
        wait_until(lambda node=node: not node.docker(*containers), f"no container left on {node.name}", 30)
    assert running.node.docker("service", "ls", "-q") == ""
    assert running.node.docker("secret", "ls", "-q") == ""
    network = ("network", "ls", "-q", "--filter", f"label=lbscaler.project={running.project}")
    wait_until(lambda: not running.node.docker(*network), "no network left")
    assert "lbscaler.manager" not in running.node.docker("node", "inspect", "self")
