"""The settings in README.md and docs/settings.md are those of the table."""

from __future__ import annotations

import re
from pathlib import Path

import settings_page
from core.settings import SETTINGS, flag

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def test_flags_in_the_readme_exist_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (?:`([^`]*)`)? ?\|", README, re.MULTILINE)
    defaults = {flag(name): setting.default for name, setting in SETTINGS.items()}
    wrong = [(name, default) for name, default in rows if defaults.get(name) != default]
    assert (wrong, len(rows) >= 10) == ([], True)


def test_settings_page_is_current() -> None:
    command = "PYTHONPATH=manager python tests/settings_page.py > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page.page(), f"write it again: {command}"
