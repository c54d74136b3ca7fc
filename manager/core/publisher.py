"""The snapshot of the backends for the balancers: its revision, the long polls that wait for a change, and ip.txt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from core import snapshot
from core.fleet import ACTIVE, Fleet
from core.settings import Settings
from core.state_files import StateFiles


class Closing(Exception):
    """The manager is ending: a caller that waits for a change has to connect to the next manager."""


class Publisher:
    """`lock` is the controller's. `publish` and `close` are called with it held."""

    def __init__(self, settings: Settings, files: StateFiles, lock: threading.Condition, check_source: str) -> None:
        self.revision = ""
        self.closing = False
        self._settings, self._files, self._lock = settings, files, lock
        self._check_source = check_source
        self._snapshot: dict[str, Any] = {}
        self._subscribers: list[Callable[[], None]] = []

    def publish(self, fleet: Fleet) -> None:
        """Publishes the snapshot of this fleet, if it differs from the last one."""
        new = snapshot.for_balancers(fleet, self._settings, self._check_source)
        revision = snapshot.revision(new)
        if revision == self.revision:
            return
        self.revision, self._snapshot = revision, new
        self._notify()
        self._files.write_addresses(row["ip"] for row in new["backends"] if row["state"] == ACTIVE)

    def wait(self, have: str, timeout: float) -> dict[str, Any] | None:
        """See Controller.wait_for_snapshot."""
        with self._lock:
            changed = self._lock.wait_for(lambda: self.revision != have or self.closing, timeout)
            if self.closing:
                raise Closing
            return {"revision": self.revision, **self._snapshot} if changed else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def close(self) -> None:
        """Ends every long poll."""
        self.closing = True
        self._notify()

    def _notify(self) -> None:
        self._lock.notify_all()
        for callback in self._subscribers:
            callback()
