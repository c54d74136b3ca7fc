from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.stage import Stage


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    made = Stage(tmp_path)
    yield made
    made.close()
