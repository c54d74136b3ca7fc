"""The command lines of run.sh and stop.sh, and the first stage of both: it checks the flags before anything changes.

`arguments.py run.sh FLAG...` exits with 2 and one line of text for an invalid setting, performs --help, --doctor,
--status and --watch, and exits with FLAGS_ARE_VALID if a start has to follow. `arguments.py stop.sh FLAG...` does the
same for a stop. The value of a setting is that of its flag, else of its variable, else of the running project, else the
default.
This module uses the standard library only, because the virtual environment may not exist yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from cli import unit
from core import backend_files
from core.settings import ROOT, SETTINGS, VERSION, SettingError, Settings, flag, parse, read, variable, with_stored

FLAGS_ARE_VALID = 10  # exit code: the flags are valid, run.sh or stop.sh continues
BAD_USAGE = 2
TOO_OLD = 1  # exit code: the manager does not run on this Python
DOWN = 1  # exit code of --status and --watch: the project does not run

EPILOG = """\
Every setting can also be given as a variable: --max 20 is LB_MAX=20.
Exit codes: 0 it serves, 1 a step failed and was undone, 2 a bad setting, 129, 130, 143 ended by a signal."""


@dataclass(frozen=True)
class Arguments:
    """The command line of run.sh. `variables` has the text of every setting, by its LB_ name."""

    settings: Settings
    variables: Mapping[str, str]
    backends: str = ""  # how many to start with; empty: as many as before, or --min
    follow: bool = False
    no_wait: bool = False
    swarm_init: bool = False
    no_install: bool = False
    at_boot: bool = False
    rotate_secrets: bool = False
    doctor: bool = False
    status: bool = False
    watch: bool = False
    json: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}; ./{self.prog} --help lists the flags")


def run_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Starts the load balancer, or applies changed settings to the running one.",
        epilog=EPILOG,
    )
    switches = {
        "follow": "stay and print the manager's log",
        "no_wait": "do not wait for the end of an update of the backends",
        "swarm_init": "make this host a Swarm if it is in none",
        "at_boot": "start the manager at every boot, by a systemd unit; stop.sh removes it",
        "rotate_secrets": "replace the manager's token, in a Swarm also its certificate, while the project serves",
        "no_install": "install nothing on this host; print what is missing",
        "status": "print the state of the running project; exit code 0 healthy, 1 it does not run, 3 degraded",
        "watch": "print the state continuously, until Ctrl-C",
        "doctor": "check this host: print what would stop run.sh, and how to fix it",
        "json": "with --status or --doctor: print JSON",
    }
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("backends", nargs="?", default="", help="how many backends to start with (default: --min)")
    for name, meaning in switches.items():
        parser.add_argument(flag(name), action="store_true", help=meaning)
    groups = {}
    for name, setting in SETTINGS.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        default = f" (default: {setting.default})" if setting.default else ""
        groups[setting.group].add_argument(
            flag(name),
            action="append" if setting.many else "store",
            metavar=name.upper(),
            help=f"{setting.meaning}; {setting.allowed}{default}",
        )
    return parser


def stop_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stop.sh",
        allow_abbrev=False,
        description="Waits for the open connections, then removes everything of this project, and nothing else.",
    )
    default = os.environ.get(variable("project"), SETTINGS["project"].default)
    parser.add_argument("--project", default=default, help="name of the installation (default: %(default)s)")
    parser.add_argument("--now", action="store_true", help="do not wait for open connections")
    parser.add_argument("--images", action="store_true", help="also remove all projects' images that are not in use")
    parser.add_argument("--engine", action="store_true", help="also stop the Docker Engine, if run.sh started it")
    return parser


def run_arguments(words: Sequence[str], environ: Mapping[str, str]) -> Arguments:
    """Raises SettingError."""
    # A flag overrides its variable.
    parsed = vars(run_parser().parse_args(words))
    given = dict(environ)
    for name in SETTINGS:
        value = parsed.pop(name)
        if isinstance(value, list):  # --tmpfs '' clears the list
            value = shlex.join(item for item in value if item)
        if value is not None:
            given[variable(name)] = value
    # Without flag and variable, the running project's value is used, or else the default.
    variables = with_stored(given)
    settings = read(variables)
    if parsed["watch"] and parsed["json"]:
        raise SettingError("--watch prints no JSON; use --status --json")
    backends = parsed["backends"]
    is_number = re.fullmatch("[0-9]{1,4}", backends)
    if backends and not (is_number and settings.min <= int(backends) <= settings.max):
        allowed = f"{settings.min} (--min) to {settings.max} (--max)"
        raise SettingError(f"the number of backends is {backends!r}; allowed: {allowed}")
    if parsed["at_boot"] and not unit.usable():
        raise SettingError("--at-boot needs root and systemd; without them, let cron (@reboot) call run.sh")
    return Arguments(settings, variables, **parsed)


def stop_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Raises SettingError."""
    parsed = stop_parser().parse_args(words)
    parse("project", parsed.project)
    return parsed


def _status(arguments: Arguments, words: Sequence[str]) -> int:  # noqa: RET503 - exec does not return
    """Replaces this process by cli.watch, which needs the packages in .venv. Without .venv no project runs here: prints
    that and returns the exit code."""
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        return print_down(arguments, f"project {arguments.settings.project} does not run here; ./run.sh starts it")
    os.execv(python, [str(python), "-m", "cli.watch", *words])  # noqa: S606 - a fixed program


def print_down(arguments: Arguments, problem: str) -> int:
    """Prints for --status and --watch that the project does not run. Returns the exit code."""
    if arguments.json:
        print(json.dumps({"project": arguments.settings.project, "state": "down", "problem": problem}))
    else:
        print(f"run.sh: {problem}", file=sys.stderr)
    return DOWN


def main(program: str, words: Sequence[str]) -> int:
    from cli import doctor  # noqa: PLC0415 - a start does not need it

    try:
        if program == "stop.sh":
            stop_arguments(words)
            return FLAGS_ARE_VALID
        arguments = run_arguments(words, os.environ)
        only_reads = arguments.doctor or arguments.status or arguments.watch or arguments.json
        if not only_reads:
            backend_files.check(arguments.settings)
    except SettingError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return BAD_USAGE
    if arguments.doctor:
        return doctor.report(doctor.Host(arguments.settings, os.environ, not arguments.no_install), arguments.json)
    if sys.version_info < doctor.OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"{program}: python3 is Python {version}; install 3.11 or later as python3", file=sys.stderr)
        return TOO_OLD
    if arguments.status or arguments.watch or arguments.json:
        return _status(arguments, words)
    return FLAGS_ARE_VALID


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
