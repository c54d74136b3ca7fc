"""The processes that send the tests' loads. Each ends with the test that began it, also when that test fails."""

from __future__ import annotations

import subprocess

_begun: list[subprocess.Popen[str]] = []


def begin(command: list[str]) -> subprocess.Popen[str]:
    _begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return _begun[-1]


def end_all() -> None:
    while _begun:
        process = _begun.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()
