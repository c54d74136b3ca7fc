"""Runs the engine's slow calls on threads. A call changes no state of the manager: the controller takes its result."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from core.engine import Engine, EngineError, NameTaken, TakenOver
from core.fleet import FAILED, Backend, Container

WORKERS = 8  # threads of each pool
RESIZE = "the fleet"  # the name of a call for all backends
BALANCER = "the balancer"  # the name of a call for the balancer
PAUSE = 0.5  # seconds before a failed call is tried again
LONGEST_PAUSE = 10.0  # seconds; before a stop that has failed several times is tried again

log = logging.getLogger("manager")


@dataclass(frozen=True)
class Result:
    """The end of a call for the backend `name`. A launch: `container`, or `why` it failed. A stop: the container is
    removed, or `still_there`. `last_log_line` is that of a failed backend."""

    name: str
    container: Container | None = None
    still_there: bool = False
    why: str = ""
    name_taken: bool = False
    last_log_line: str = ""


class Workers:
    """At most one call for each backend runs at a time; `busy` has its name until the controller takes the result."""

    def __init__(self, engine: Engine, done: Callable[[], None]) -> None:
        self.busy: set[str] = set()
        self._engine, self._done = engine, done
        self._lines_read: set[str] = set()  # ids of containers whose last log line was read
        self._stop_pauses: dict[str, float] = {}  # by container that could not be stopped: seconds after its last try
        # Two pools, so that the launches of a burst do not queue behind stops, which last up to ten seconds each.
        self._launching = ThreadPoolExecutor(WORKERS, thread_name_prefix="launch")
        self._stopping = ThreadPoolExecutor(WORKERS, thread_name_prefix="stop")
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()

    def launch(self, name: str, spec: str) -> None:
        self._begin(self._launching, name, lambda: self._launch(name, spec))

    def stop(self, backend: Backend) -> None:
        self._begin(self._stopping, backend.name, lambda: self._stop(backend))

    def resize(self, count: int, spec: str) -> None:
        if RESIZE not in self.busy:
            self._begin(self._launching, RESIZE, lambda: self._resize(count, spec))

    def repair_balancer(self) -> None:
        self._begin(self._launching, BALANCER, self._repair_balancer)

    def results(self) -> Iterator[Result]:
        """The calls that have ended since the last time; taking a result allows the next call for that backend."""
        while not self._results.empty():
            result = self._results.get()
            self.busy.discard(result.name)
            yield result

    def _begin(self, pool: ThreadPoolExecutor, name: str, call: Callable[[], Result]) -> None:
        def work() -> None:
            # An unexpected error has to give a result as well; without one, the backend would stay busy for ever.
            result = Result(name, still_there=True)
            try:
                result = call()
            except TakenOver:
                pass  # the loop's next list raises it, too, and logs it
            except Exception:
                log.exception("a call of the engine failed; trying again")
                time.sleep(PAUSE)
            finally:
                self._results.put(result)
                self._done()

        self.busy.add(name)
        pool.submit(work)

    def _launch(self, name: str, spec: str) -> Result:
        try:
            return Result(name, self._engine.launch(name, spec))
        # After an unexpected error, too, there is no container whose state the next list could show.
        except Exception as error:
            log.error("launch of %s failed: %s", name, error)
            return Result(name, why=str(error), name_taken=isinstance(error, NameTaken))

    def _resize(self, count: int, spec: str) -> Result:
        try:
            self._engine.resize(count, spec)
        except EngineError as error:
            # The next pass plans it again.
            log.error("resize to %d failed, will try again: %s", count, error)
            time.sleep(PAUSE)
        return Result(RESIZE)

    def _repair_balancer(self) -> Result:
        try:
            self._engine.repair_balancer()
        except EngineError as error:
            return Result(BALANCER, why=str(error))
        return Result(BALANCER)

    def _stop(self, backend: Backend) -> Result:
        line, last_pause = "", self._stop_pauses.get(backend.id, 0.0)
        try:
            if backend.state == FAILED and backend.id not in self._lines_read:
                with suppress(EngineError):  # some logging drivers cannot be read
                    line = self._engine.last_log_line(backend.id)
                    log.warning("last log line of %s: %s", backend.name, line or "none")
                    self._lines_read.add(backend.id)
            self._engine.stop(backend.id)
        except EngineError as error:
            log.error("stop of %s failed, will try again: %s", backend.name, error)
            # The controller plans the stop again as soon as it has this result, hence the pause.
            pause = min(2 * last_pause, LONGEST_PAUSE) or PAUSE
            self._stop_pauses[backend.id] = pause
            time.sleep(pause)
            return Result(backend.name, still_there=True, last_log_line=line)
        self._stop_pauses.pop(backend.id, None)
        self._lines_read.discard(backend.id)
        return Result(backend.name, last_log_line=line)
