from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import script
from web.recent_log import RecentLog


@pytest.fixture
def no_other_handlers() -> Iterator[None]:
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = before


def test_the_log_file_has_one_line_for_each_event_and_is_rotated(tmp_path: Path, no_other_handlers: None) -> None:
    log = tmp_path / "manager.log"
    recent_log = script.start_log(log)
    logging.getLogger("manager").info("CREATE_SERVER %s", "2→5")
    assert log.read_text().endswith(" INFO    CREATE_SERVER 2→5\n")
    assert isinstance(recent_log, RecentLog)
    assert [(record.level, record.text) for record in recent_log.newest(9)] == [("INFO", "CREATE_SERVER 2→5")]
    for _ in range(6):
        logging.getLogger("manager").info("x" * 1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manager.log", "manager.log.1"]


def test_a_backends_output_cannot_add_a_line_or_control_the_terminal(tmp_path: Path, no_other_handlers: None) -> None:
    script.start_log(tmp_path / "manager.log")
    forged = "\x1b]0;title\x07 no\r\n2026-01-01 00:00:00 INFO    STOP_SERVER 2→1 \u202etxt"
    logging.getLogger("manager").warning("last log line of %s: %s", "b-1", forged)
    logging.getLogger("manager").error("this pass failed", exc_info=ValueError("why"))
    first, second, *traceback = (tmp_path / "manager.log").read_text().split("\n")
    assert first.endswith("last log line of b-1: ?]0;title? no??2026-01-01 00:00:00 INFO    STOP_SERVER 2→1 ?txt")
    assert second.endswith(" this pass failed")
    assert traceback[-2:] == ["ValueError: why", ""]
