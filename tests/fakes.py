"""What the unit tests put in the world's place: a clock that stands still, an engine in memory, a balancer's words."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.controller import Controller
from core.engine import BalancerState, Engine, EngineError, Event, NameTaken
from core.fleet import ACTIVE, Container
from core.load import Report, Sample
from core.settings import Settings, read, variable
from core.state_files import SavedFleet, StateFiles
from web.metrics import Tally

TOKEN = "0123456789abcdef"


class Clock:
    """Stands still until it is moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class FakeEngine(Engine):
    """Docker in memory, as `controller.Engine` wants it; a new container gets the lowest free address, as Docker's do.

    Faults: while `down` is set every call raises it; `refusals` are raised by the next launches, one each, `no_logs` by
    last_log_line, and `balancer_error` by repair_balancer; launches and stops wait for `gate`; `foreign` are names of
    others' containers; what is made from a spec in `crashing` ends at once with that exit code.
    """

    def __init__(self, *running: str) -> None:
        self.containers: dict[str, Container] = {}  # by name
        self.calls: list[tuple[str, str]] = []  # what was begun, in order: (launch, name), (stop, name)
        self.threads: set[str] = set()  # that launched or stopped
        self.lists = 0  # looks at the list so far
        self.down = ""
        self.refusals: list[EngineError] = []
        self.no_logs = ""
        self.balancer_error = ""
        self.path: dict[str, str] = {}  # what a check of the data path finds: target -> error
        self.path_checks = 0
        self.foreign: set[str] = set()
        self.image = "image-1"  # the spec of what runs and of what is to be launched
        self.crashing: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._events: queue.Queue[Event | EngineError | None] = queue.Queue()
        for name in running:
            self.run(name)

    def list(self) -> list[Container]:
        self.lists += 1
        self._answer()
        with self._lock:
            return list(self.containers.values())

    def spec(self) -> str:
        self._answer()
        return self.image

    def launch(self, name: str, spec: str) -> Container:
        self._begin("launch", name)
        if name in self.foreign:
            raise NameTaken(f"the name {name} is already in use")
        if self.refusals:
            raise self.refusals.pop(0)
        assert name not in self.containers, f"{name} launched twice"
        made = self.run(name, spec)
        if spec in self.crashing:
            self.die(name, self.crashing[spec])
        return made

    def stop(self, container_id: str) -> None:
        with self._lock:
            name = next((c.name for c in self.containers.values() if c.id == container_id), "")
        self._begin("stop", name)
        with self._lock:
            self.containers.pop(name, None)

    def last_log_line(self, container_id: str) -> str:
        self._answer()
        if self.no_logs:
            raise EngineError(self.no_logs)
        return "goodbye"

    def check_path(self) -> dict[str, str]:
        self.path_checks += 1
        return dict(self.path)

    def repair_balancer(self) -> None:
        self._begin("repair", "balancer")
        if self.balancer_error:
            raise EngineError(self.balancer_error)
        self.balancer = BalancerState.RUNNING

    def events(self) -> Iterator[Event]:
        while (event := self._events.get()) is not None:
            if isinstance(event, EngineError):
                raise event
            yield event

    def run(self, name: str, spec: str = "") -> Container:
        """A container that is ours is there, whoever started it."""
        with self._lock:
            used = {container.ip for container in self.containers.values()}
            ip = next(ip for n in itertools.count(2) if (ip := f"198.18.{n >> 8}.{n & 255}") not in used)
            id_ = f"{next(self._numbers):064x}"[::-1]
            self.containers[name] = Container(id_, name, ip, "running", spec=spec or self.image)
            return self.containers[name]

    def die(self, name: str, code: int) -> None:
        """The container ends by itself, which frees its address; the engine says so."""
        self.containers[name] = replace(self.containers[name], status="exited", exit_code=code, ip="")
        self.tell(Event("die", self.containers[name].id, code))

    def tell(self, event: Event | EngineError | None) -> None:
        """Sends an event alone; None ends the stream, an error breaks it."""
        self._events.put(event)

    def _begin(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        self.threads.add(threading.current_thread().name)
        self.gate.wait(5)
        self._answer()

    def _answer(self) -> None:
        if self.down:
            raise EngineError(self.down)


def settings(**changes: object) -> Settings:
    """The defaults, but for `changes`; the project is called p."""
    return read({variable(name): str(value) for name, value in {"project": "p", **changes}.items()})


class Chance:
    """A random number that is known; in the middle, jitter changes nothing."""

    value = 0.5

    def random(self) -> float:
        return self.value


def save_active(place: Path, ids: Iterable[str]) -> None:
    """Writes the state files of a manager that had these containers in rotation."""
    StateFiles(place / "ip.txt").write_fleet(SavedFleet(states=dict.fromkeys(ids, ACTIVE)))


def controller(engine: FakeEngine, place: Path, clock: Clock, **changes: object) -> Controller:
    """A controller whose predecessor had all that runs in rotation, unless the place holds what another one saved."""
    ip_file = place / "ip.txt"
    if not ip_file.exists() and isinstance(engine, FakeEngine):
        save_active(place, [container.id for container in engine.containers.values()])
    chance = Chance().random
    return Controller(engine, settings(**changes), ip_file, Tally(), clock, chance=chance)


def sample(packets: int = 0, healthy: bool | None = True, connections: int = 0, active: int = 0, **more: Any) -> Sample:
    return Sample(connections, packets, 100 * packets, active, healthy, **more)


def report(balancer: str = "b1", warnings: tuple[str, ...] = (), **backends: Sample) -> Report:
    """One of every two seconds; backends are named by the end of their address: `_2=sample(…)` is 198.18.0.2."""
    by_ip = {f"198.18.0{name.replace('_', '.')}": one for name, one in backends.items()}
    return Report(balancer, "r", 2.0, by_ip, warnings)


def eventually(condition: Callable[[], object], within: float = 3.0) -> bool:
    """Whether `condition` comes true while other threads do their work."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
