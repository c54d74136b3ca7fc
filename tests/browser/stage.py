"""The manager for the browser tests: the real application over a fake engine."""

from __future__ import annotations

import itertools
import logging
import math
import socket
from pathlib import Path

from core.engine import EngineError
from core.load import Report, Sample
from fakes import TOKEN, Clock, FakeEngine, controller, eventually
from script import start_log
from web.app import create_app
from web.listeners import Listeners, bind_tcp


class StuckEngine(FakeEngine):
    """Stops no container while it is `stuck`, so that draining and failed backends stay in the table."""

    stuck = False

    def stop(self, container_id: str) -> None:
        if self.stuck:
            raise EngineError("the engine is busy")
        super().stop(container_id)


class Stage:
    """Two backends, a balancer whose reports are made by `report`, and a clock that only the reports move."""

    port = 0  # a free one at first, then always the same: a browser keeps in its cache what it got from that address

    def __init__(self, place: Path, past: float = 0.0, **changes: object) -> None:
        """The clock starts `past` seconds before now."""
        self.engine, self.clock = StuckEngine(), Clock()
        self.controller = controller(self.engine, place, self.clock, **changes)
        self.name = f"{self.controller.settings.project}-backend-"
        for number in (1, 2):
            self.engine.run(f"{self.name}{number}")
        self.controller._epoch -= past
        self.controller.adopt(None)
        self.log = self.controller.settings.run_dir / "manager.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        handlers_before = list(logging.getLogger().handlers)
        self._recent_log = start_log(self.log)
        self._handlers = [handler for handler in logging.getLogger().handlers if handler not in handlers_before]
        self._counted: dict[str, tuple[float, float]] = {}
        listener = bind_tcp("127.0.0.1", Stage.port)
        Stage.port = listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._serve(listener)

    def report(self, *rates: float, seconds: float = 2.0, balancer: str = "b1", panic: bool = False) -> None:
        """One report for each rate, `seconds` apart: packets a second over all active backends."""
        for rate in rates:
            self.clock.pass_by(seconds)
            self.controller.report(Report(balancer, "r", 2.0, self._samples(rate, seconds), panic=panic))
            self.controller.step()

    def settle(self) -> None:
        """Steps until each launch has ended."""

        def launched() -> bool:
            self.controller.step()
            return all(row["ip"] for row in self.controller.status()["backends"])

        assert eventually(launched)

    def _samples(self, rate: float, seconds: float) -> dict[str, Sample]:
        snapshot = self.controller.wait_for_snapshot("", 0)
        assert snapshot is not None
        weights = {
            b["ip"]: 1 + 0.25 * math.sin(int(b["id"][:6], 16)) for b in snapshot["backends"] if b["state"] == "active"
        }
        whole, samples = sum(weights.values()), {}
        for backend in snapshot["backends"]:
            ip, share = backend["ip"], weights.get(backend["ip"], 0.0) / (whole or 1)
            packets, connections = self._counted.get(backend["id"], (0.0, 0.0))
            packets, connections = packets + share * rate * seconds, connections + share * rate * seconds / 9
            self._counted[backend["id"]] = packets, connections
            counted = (round(connections), round(packets), round(600 * packets), round(share * rate / 30))
            samples[ip] = Sample(*counted, True, share, backend["id"])
        return samples

    # -- the server stops and restarts -------------------------------------------------------------------------------

    def stop_server(self) -> None:
        """Stops the server and its connections, after the current answers."""
        self._listeners.stop()

    def restart_server(self) -> None:
        self._serve(bind_tcp("127.0.0.1", self.port))

    def close(self) -> None:
        self.controller.close()
        self.stop_server()
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def _serve(self, listener: socket.socket) -> None:
        self._listeners = Listeners()
        self._listeners.add(listener, create_app(self.controller, TOKEN, [], recent_log=self._recent_log))
        self._listeners.start()


HOUR = 4200.0  # seconds of a_busy_hour


def a_busy_hour(stage: Stage) -> None:
    """Waves and bursts, so that the fleet grows and shrinks; at the end one backend has failed and one drains."""
    for second in itertools.count(0, 2):
        if second >= HOUR:
            break
        wave = 260 + 170 * math.sin(second / 480) + 25 * math.sin(second / 19) + 12 * math.sin(second / 3.1)
        burst = 520 * math.exp(-(((second - 2600) / 110) ** 2)) + 330 * math.exp(-(((second - 3950) / 90) ** 2))
        stage.report(wave + burst)
        if any(not row["ip"] for row in stage.controller.status()["backends"]):
            stage.settle()
        if second == 1800:
            stage.engine.die(f"{stage.name}3", 137)
    stage.engine.stuck = True
    rows = [row for row in stage.controller.status()["backends"] if row["state"] == "active"]
    stage.engine.die(rows[1]["name"], 137)
    stage.controller.step()
    stage.controller.drain(rows[0]["ip"])
    stage.settle()
    stage.report(640, 655)
