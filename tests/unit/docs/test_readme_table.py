from __future__ import annotations

import re
from pathlib import Path

from core.settings import SETTINGS, flag

README = (Path(__file__).parents[3] / "README.md").read_text()


def test_the_readmes_flags_exist_and_have_the_defaults_it_states() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (?:`([^`]*)`)? ?\|", README, re.MULTILINE)
    defaults = {flag(name): setting.default for name, setting in SETTINGS.items()}
    assert len(rows) == 10
    assert [row for row in rows if defaults.get(row[0]) != row[1]] == []
