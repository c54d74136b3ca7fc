"""Finds in the last lines of a failed backend's log which setting may help. Pure.

It searches text that is meant for people, because a program reports the reason for its end nowhere else. The result is
also text for people: it is logged, and no decision depends on it.
"""

from __future__ import annotations

import re

# What a program logs when least privilege or a limit stops it -> the flag that lifts the restriction.
HINTS = {
    "read-only file system": "it writes to a read-only path: --tmpfs PATH, or --allow write",
    "permission denied": "it may need its image's own user or more rights: --allow root, then --allow capabilities",
    "operation not permitted": "it may need root's rights: --allow root, then --allow capabilities",
    "must be root": "--allow root",
    "cannot allocate memory": "it may need more memory: --memory",
    "too many open files": "--ulimit nofile=NUMBER",
    "resource temporarily unavailable": "it may need more processes or threads: --allow processes",
}
# Lines that do not explain why a program ends: low levels, and nginx's alert that it may not raise its own limit.
HARMLESS = re.compile(r"\b(debug|info|notice)\b|setrlimit\(")
# Lines that do explain it, even if no flag helps.
ERROR = re.compile(r"\b(error|emerg|emergency|crit|critical|fatal|panic)\b")
# Exit codes of containers that did not fail: success, and the codes after SIGKILL and SIGTERM.
NOT_FAILED = (0, 128 + 9, 128 + 15)


def failure_hint(log_lines: str, exit_code: int | None, out_of_memory: bool = False) -> str:
    """The setting that may help a backend; empty when none is known.

    `log_lines` is the end of its log. `exit_code` is None while its container runs. A container that still runs or was
    stopped gets no hint, because an error in its log did not end it. The last line that reports an error decides,
    because the program continued after earlier errors.
    """
    if out_of_memory:
        return "the kernel killed it for its memory use: raise --memory"
    if exit_code is None or exit_code in NOT_FAILED:
        return ""
    for line in reversed(log_lines.lower().splitlines()):
        if HARMLESS.search(line):
            continue
        for complaint, hint in HINTS.items():
            if complaint in line:
                return hint
        if ERROR.search(line):
            return ""
    return ""


def with_hint(line: str, hint: str) -> str:
    return f"{line} [{hint}]" if hint else line
