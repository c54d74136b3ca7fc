"""At most one manager controls the fleet of a Swarm: the one that started last.

Each manager writes a claim as a label of its own node when it starts. A manager that finds a newer claim ends. Claims
are not labels of the service, because every change of the service would have to keep them.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from typing import Any

from core.engine import TakenOver
from engines.swarm_services import ApiObject, retry_when_overtaken

# When the manager started, in seconds since 1970 or one more than any earlier claim, and where. The highest one counts.
Claim = tuple[int, str]


def parse_claim(label: str) -> Claim:
    """The claim in a label's text; the lowest claim if the text is not one."""
    number, _, owner = label.partition(" ")
    return (int(number), owner) if re.fullmatch("[0-9]{1,18}", number) else (0, "")


class FleetClaim:
    def __init__(self, client: Any, project: str) -> None:
        self._client = client
        self._label = f"lbscaler.manager.{project}"
        self._own: Claim | None = None

    def hold(self, nodes: Iterable[ApiObject]) -> None:
        """The first call claims the fleet. A later call raises TakenOver if there is a newer claim."""
        labels = [node["Spec"].get("Labels", {}).get(self._label, "") for node in nodes]
        newest = max(map(parse_claim, labels), default=(0, ""))
        if self._own is None:
            own = (max(int(time.time()), newest[0] + 1), f"{socket.gethostname()}, pid {os.getpid()}")
            retry_when_overtaken(lambda: self._write(own))
            self._own = own
        elif newest > self._own:
            raise TakenOver(f"the manager at {newest[1]} has taken over; this one ends")

    def _write(self, claim: Claim) -> None:
        node_id = self._client.info()["Swarm"]["NodeID"]
        node = self._client.api.inspect_node(node_id)
        labels = {**node["Spec"].get("Labels", {}), self._label: f"{claim[0]} {claim[1]}"}
        self._client.api.update_node(node_id, node["Version"]["Index"], {**node["Spec"], "Labels": labels})
