"""The files of --env-file and --secret, and the user who may read a secret.

Values may be passwords, so no message contains a part of a file. This module uses the standard library only, because
run.sh checks the files before the virtual environment exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from core.settings import SettingError, Settings

UNPRIVILEGED_UID = 10001  # for the processes of an image that names no user or root
LINE = re.compile(r"[^\s=\0]+=[^\0]*")


def environment(files: Iterable[str], env: Iterable[str]) -> list[str]:
    """The variables of the files and of --env, as NAME=VALUE. Of two with the same name, the last one counts."""
    lines: list[str] = []
    for path in files:
        lines += _read_env_file(path)
    values = dict(line.split("=", 1) for line in (*lines, *env))
    return [f"{name}={value}" for name, value in values.items()]


def _read_env_file(path: str) -> list[str]:
    """The lines NAME=VALUE. A value is the rest of its line, as in Docker's env files."""
    result = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        variable = line.lstrip()
        if not variable or variable.startswith("#"):
            continue
        if not LINE.fullmatch(variable):
            raise SettingError(f"--env-file {path}, line {number}; allowed: NAME=VALUE, # and a comment, or nothing")
        result.append(variable)
    return result


def secret_files(settings: Settings) -> dict[str, str]:
    """The files of --secret, by their names in the backends."""
    return dict(secret.split("=", 1) for secret in settings.secret)


def swarm_secret(project: str, copy: str) -> str:
    """The name of the Swarm's secret with the content of a copy that cli.file_copies made."""
    return f"{project}-{Path(copy).name}"


def check(settings: Settings) -> None:
    """Raises SettingError if a file cannot be used."""
    try:
        environment(settings.env_file, ())
        for path in secret_files(settings).values():
            Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"cannot read {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingError("a file of --env-file is no text in UTF-8") from None


def user_id(settings: Settings, image_user: str) -> int | None:
    """The user that a backend's processes run as. None if the image names one that only it has a number for."""
    name = image_user.split(":", 1)[0]
    if name in ("", "root", "0"):
        return 0 if "root" in settings.allow else UNPRIVILEGED_UID
    return int(name) if re.fullmatch("[0-9]{1,9}", name) else None
