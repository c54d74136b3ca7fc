from __future__ import annotations

import re
from pathlib import Path

from core.settings import SETTINGS, flag

README = (Path(__file__).parents[3] / "README.md").read_text()


def test_the_readme_lists_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (?:`([^`]*)`)? ?\|", README, re.MULTILINE)
    assert dict(rows) == {flag(name): setting.default for name, setting in SETTINGS.items()}
