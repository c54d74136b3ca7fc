"""Keeps the newest log records in memory, as fields, for GET /log. The file manager.log, for people, keeps more."""

from __future__ import annotations

import logging
from collections import deque

from web.schemas import LogRecord

KEPT = 500  # records


class RecentLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._records: deque[LogRecord] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        # The default format is the message and the traceback, if there is one.
        self._records.append(LogRecord(record.created, record.levelname, self.format(record)))

    def newest(self, count: int) -> list[LogRecord]:
        """At most `count` records, oldest first."""
        with self.lock:  # type: ignore[union-attr] # set by logging.Handler
            return list(self._records)[-count:]
