"""Makes docs/settings.md from the table of the settings.

PYTHONPATH=manager python tests/settings_page.py > docs/settings.md
"""

from __future__ import annotations

import sys

from core.settings import SETTINGS, flag, variable

HEAD = """\
# Settings

Every setting is a flag of `run.sh` and a variable: `--max 20` is `LB_MAX=20`. The flag is used first, then its
variable, then the value that the running project was started with, then the default. A flag that may be given several
times is marked with +; its variable holds all values, quoted as in a shell.

This page is made from `manager/core/settings.py` by `tests/settings_page.py`.
"""


def page() -> str:
    lines = [HEAD]
    group = ""
    for name, setting in SETTINGS.items():
        if setting.group != group:
            group = setting.group
            lines += [f"\n## {group}\n", "| flag | variable | default | meaning | allowed |", "|---|---|---|---|---|"]
        default = f"`{setting.default}`" if setting.default else ""
        more = " +" if setting.many else ""
        lines.append(
            f"| `{flag(name)}`{more} | `{variable(name)}` | {default} | {setting.meaning} | {setting.allowed} |"
        )
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
