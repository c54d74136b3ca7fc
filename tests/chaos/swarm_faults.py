"""Faults of a Swarm's nodes, of its leader, and of the project's parts on it."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from chaos.allowances import clients_of_node, in_flight, node_lost, node_lost_slowly, nothing, outage
from chaos.control import run_again, signal_manager, update
from chaos.fault import SWARM, Fault, Injected
from chaos.site import wait_for
from chaos.swarm_site import BACKENDS, MORE, SERVICES, SwarmProduct, SwarmSite, containers_on
from swarm.cluster import Node


@dataclass
class SwarmStage:
    """What a fault can use. The random numbers are of the campaign's seed."""

    site: SwarmSite
    product: SwarmProduct
    random: random.Random

    @property
    def manager_node(self) -> Node:
        return self.product.system.node

    def others(self) -> list[Node]:
        """The nodes that serve, without the manager's."""
        return [node for node in self.site.serving() if node is not self.manager_node]

    def other_with_backends(self) -> Node:
        """One of them, with backends if there is one: a node that was away gets none until the number grows."""
        others = self.others()
        used = [node for node in others if containers_on(node, "backend")]
        return self.random.choice(used or others)

    def any_container(self, role: str) -> tuple[Node, str]:
        found = [(node, id_) for node in self.site.serving() for id_ in containers_on(node, role)]
        return self.random.choice(found)


def victims_on(node: Node) -> list[str]:
    return [id_[:12] for id_ in containers_on(node, "backend")]


def lose(site: SwarmSite, node: Node, by: Callable[[], object], back: Callable[[], object], **more: bool) -> Injected:
    """Its victims are the backends there."""
    victims = victims_on(node)
    by()
    site.lost.add(node.name)

    def undo() -> None:
        back()
        site.lost.discard(node.name)

    return Injected(victims, undo, [node.ip], **more)


# -- nodes ------------------------------------------------------------------------------------------------------------


def cut(stage: SwarmStage) -> Injected:
    node = stage.other_with_backends()
    return lose(stage.site, node, node.cut, node.reconnect, settles=True)


def fail(stage: SwarmStage) -> Injected:
    """No engine, no containers, no link."""
    node = stage.other_with_backends()

    def back() -> None:
        node.reconnect()
        node.start_engine()

    return lose(stage.site, node, node.kill_engine, back, settles=True)


def kill_engine(stage: SwarmStage, node: Node, settles: bool) -> Injected:
    """The engine alone: its containers go on until it starts again."""
    return lose(stage.site, node, lambda: node.end_engine(signal.SIGKILL), node.start_engine, settles=settles)


def cut_manager_node(stage: SwarmStage) -> Injected:
    return lose(stage.site, stage.manager_node, stage.manager_node.cut, stage.manager_node.reconnect)


def move_off_lost_node(stage: SwarmStage) -> Injected:
    old = stage.manager_node
    injected = lose(stage.site, old, old.cut, old.reconnect, settles=True)
    stage.site.wait_for_leader()
    stage.product.move(stage.random.choice(stage.others()))
    return injected


def drain(stage: SwarmStage) -> Injected:
    node = stage.random.choice(stage.site.serving())
    stage.site.drained.add(node.name)
    stage.site.swarm("node", "update", "--availability", "drain", node.name)

    def undo() -> None:
        stage.site.swarm("node", "update", "--availability", "active", node.name)
        stage.site.drained.discard(node.name)

    return Injected([], undo, [node.ip], settles=True)


# -- the Swarm and the project ----------------------------------------------------------------------------------------


def demote_leader(stage: SwarmStage) -> Injected:
    old = stage.site.wait_for_leader()
    stage.site.swarm("node", "demote", old.name)
    wait_for(lambda: stage.site.leader() not in (None, old), "another leader", 60)
    return Injected([], lambda: stage.site.swarm("node", "promote", old.name))


def move_manager(stage: SwarmStage) -> Injected:
    stage.product.move(stage.random.choice(stage.others()))
    return Injected()


def kill_backend(stage: SwarmStage) -> Injected:
    node, id_ = stage.any_container("backend")
    node.docker("kill", id_)
    return Injected([id_[:12]])


def kill_balancer(stage: SwarmStage) -> Injected:
    node, id_ = stage.any_container("balancer")
    node.docker("kill", id_)
    return Injected([], nodes=[node.ip])


def remove_balancers(stage: SwarmStage) -> Injected:
    stage.site.swarm("service", "rm", SERVICES["balancer"])
    return Injected()


def scale(stage: SwarmStage) -> Injected:
    stage.product.scale(MORE)
    return Injected([], lambda: stage.product.scale(BACKENDS), settles=True)


NODE_LOST = "requests of this node's clients fail, and requests in progress on its backends"


def in_swarm(*values: object, **more: object) -> Fault:
    return Fault(*values, datapaths=(SWARM,), **more)


FAULTS = [
    in_swarm(
        "cut a node off", "node", cut, node_lost,
        f"{NODE_LOST}; when it returns, its Swarm agent takes up to 40 s",
        bound=90, budget=75,
    ),
    in_swarm(
        "lose a node: no link, no engine, no containers", "node", fail, node_lost,
        NODE_LOST, bound=90, budget=90,
    ),
    in_swarm(
        "kill a node's engine", "node", lambda stage: kill_engine(stage, stage.other_with_backends(), True),
        node_lost_slowly,
        "its containers continue to serve, but the overlay network forgets them; the engine ends them at its start",
        bound=90, budget=90,
    ),
    in_swarm(
        "kill the engine of the Swarm's leader", "node",
        lambda stage: kill_engine(stage, stage.site.wait_for_leader(), False), node_lost_slowly,
        "the same happens, for a few seconds", hold=4, bound=90, alone=True, budget=60,
    ),
    in_swarm(
        "cut the manager's node off", "node", cut_manager_node, node_lost,
        f"{NODE_LOST}; the others keep the last rules", hold=20, bound=90,
        alone=True, budget=70,
    ),
    in_swarm(
        "cut the manager's node off, and start the manager on another", "node", move_off_lost_node, node_lost,
        NODE_LOST, bound=90, alone=True, budget=100,
    ),
    in_swarm(
        "drain a node, then activate it", "node", drain, clients_of_node,
        "a drained node has no balancer; its backends finish what they have", bound=60, budget=65,
    ),
    in_swarm(
        "demote the Swarm's leader, then promote it", "leader", demote_leader, nothing, "the rules stay", bound=45,
        budget=30,
    ),
    in_swarm(
        "start the manager on another node", "manager", move_manager, nothing, "the rules stay", bound=45,
        alone=True, budget=45,
    ),
    in_swarm(
        "kill the manager (Swarm)", "manager", lambda stage: signal_manager(stage, signal.SIGKILL), nothing,
        "the rules stay", bound=30, budget=25,
    ),
    in_swarm(
        "kill a backend (Swarm)", "backend", kill_backend, in_flight, "what was open on it ends with it", bound=30,
        replaced=True, budget=25,
    ),
    in_swarm(
        "kill a node's balancer", "balancer", kill_balancer, clients_of_node, "requests of this node's clients fail",
        bound=30, budget=30,
    ),
    in_swarm(
        "remove the balancers' service", "balancer", remove_balancers, outage, "no node has a balancer", bound=60,
        alone=True, budget=40,
    ),
    in_swarm(
        "rolling update by run.sh (Swarm)", "update", update, nothing,
        "each new backend is ready before an old one drains", bound=60, alone=True, budget=90,
    ),
    in_swarm("run.sh again (Swarm)", "update", run_again, nothing, "nothing has changed", bound=30, budget=25),
    in_swarm(
        "scale out and in (Swarm)", "update", scale, nothing, "grow first, drain last", bound=60, budget=50,
    ),
]  # fmt: skip
