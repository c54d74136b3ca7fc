"""The campaign on a Swarm: three nodes, each with clients of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos import swarm_observe
from chaos.allowances import Request
from chaos.campaign import IMAGE, Campaign, add_others, build_backend, say
from chaos.machine import describe
from chaos.rounds import Scene
from chaos.site import wait_for
from chaos.swarm_faults import SwarmStage
from chaos.swarm_observe import SwarmSeen
from chaos.swarm_site import SwarmLoad, SwarmProduct, SwarmSite
from swarm.cluster import REGISTRY


@dataclass
class SwarmScene(Scene):
    quiet = 10.0  # at the rate of one node's load

    def _serves(self) -> bool:
        return self.product.serves()

    def stage(self, chance: random.Random) -> SwarmStage:
        return SwarmStage(self.site, self.product, chance)

    def look(self, others: bool = False) -> SwarmSeen:
        return swarm_observe.observe(self.product, others)

    def violated(self, seen: SwarmSeen) -> list[str]:
        away = self.site.lost | self.site.drained
        unanswered = [] if self._serves() else ["a node does not answer a client at once"]
        return swarm_observe.violated(seen, self.product.wanted, away) + unanswered

    def fallen(self, before: SwarmSeen, after: SwarmSeen, resets: bool) -> list[str]:
        return swarm_observe.fallen(before, after, resets)

    def unfair(self, before: SwarmSeen, after: SwarmSeen, requests: Sequence[Request]) -> list[str]:
        return swarm_observe.unfair(before, after, requests)


class SwarmCampaign(Campaign):
    def _set_up(self, place: Path) -> None:
        self.site = SwarmSite(place)
        self.product = SwarmProduct(self.site, IMAGE)

    def _open(self) -> None:
        say("Making a Swarm of three engines, each in a network namespace of its own")
        self.site.open([self.options.balancer_image, self.options.server_image])
        self.machine = describe(self.site.nodes[0])
        self.product.install()
        build_backend(self.site.nodes[0], self.options.server_image)
        self.site.share_image(IMAGE)
        for node in self.site.nodes:
            add_others(node, IMAGE)
        self.site.swarm("service", "create", "-d", "--name", "others", f"{REGISTRY}/{IMAGE}")
        self.site.swarm("node", "update", "--label-add", "others=true", self.site.nodes[1].name)

    def _start(self) -> None:
        say("Starting the system")
        self.product.up()
        self.product.fetch_images(self.options.balancer_image)
        wait_for(self.product.serves, "every node serves", 90)

    def _scene(self, before: list[str]) -> SwarmScene:
        return SwarmScene(self.site, self.product, before)

    def _foreign(self) -> list[str]:
        return swarm_observe.foreign_everywhere(self.site)

    def _load(self) -> SwarmLoad:
        return SwarmLoad(self.site)
