"""Which failed requests a fault explains. Pure. Everything that no fault explains is an error of the product.

Times are of the monotonic clock. An allowance is a function of a request and of what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REPAIR = 3.0  # seconds, at most, until a pass has repaired the rules: an interval, and a busy machine
GRACE = 0.5  # seconds between an event and its record here


@dataclass(frozen=True)
class Request:
    kind: str
    start: float
    end: float
    outcome: str  # ok, or what failed
    backend: str  # its container's name; empty if no answer named it
    node: str = ""  # of a Swarm: the one that it was sent to


@dataclass(frozen=True)
class Event:
    """One injected fault."""

    fault: str
    begun: float
    done: float  # the fault's program has returned
    out: float  # the victims are out of the rules
    undone: float
    settled: float  # all invariants hold again
    victims: frozenset[str] = frozenset()  # as in Request.backend
    nodes: frozenset[str] = frozenset()  # whose own clients the fault affects


Allowance = Callable[[Request, Event], bool]


def _on_victim(request: Request, event: Event) -> bool:
    """Names are used again: once the system is complete, the name is that of another backend."""
    meanwhile = event.begun - GRACE <= request.end and request.start <= event.settled
    return request.backend in event.victims and meanwhile


def _unknown(request: Request, event: Event, until: float) -> bool:
    """No answer named a backend: it may have been a victim if it was sent before `until`."""
    return not request.backend and request.end >= event.begun and request.start <= until + GRACE


def nothing(request: Request, event: Event) -> bool:
    return False


def in_flight(request: Request, event: Event) -> bool:
    """What was open on the victims when they failed. New connections are sent to others."""
    return _on_victim(request, event) or _unknown(request, event, event.done)


def until_out(request: Request, event: Event) -> bool:
    """What was open on the victims, and new connections that they got until they were out of the rules: their kernel
    still accepts those."""
    return _on_victim(request, event) or _unknown(request, event, event.out)


def answered_by_victims(request: Request, event: Event) -> bool:
    return _on_victim(request, event) and request.outcome.startswith("status ")


def new_until_repaired(request: Request, event: Event) -> bool:
    """New connections between the change of the rules and their repair."""
    return _unknown(request, event, event.done + REPAIR)


def outage(request: Request, event: Event) -> bool:
    """Everything that was open at some time between the fault and the first moment with all invariants."""
    return request.end >= event.begun and request.start <= event.settled + GRACE


# -- in a Swarm -------------------------------------------------------------------------------------------------------


def clients_of_node(request: Request, event: Event) -> bool:
    """What was sent to a node that did not serve; the clients of the others notice nothing."""
    return request.node in event.nodes and outage(request, event)


def node_lost(request: Request, event: Event) -> bool:
    """Clients of the node, and on other nodes what was open on its backends when it failed."""
    return clients_of_node(request, event) or in_flight(request, event)


def node_lost_slowly(request: Request, event: Event) -> bool:
    """The same, but its backends answer until they are cut off, which is before they are out of the others' rules."""
    return clients_of_node(request, event) or until_out(request, event)
