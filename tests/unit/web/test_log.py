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
