"""Settings: environment and flags in, one frozen, validated value out. A bad value is one clear line and exit code 2.

`python3 settings.py [FLAGS]` is what run.sh calls before it touches anything: flags win over the environment, that over
what the running project was started with (run/<project>/settings.json), that over the defaults; it prints shell
assignments. Standard library alone, for it runs before the virtual environment exists.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent


class SettingError(ValueError):
    """A value that cannot be used; the message names it, what was given and what is allowed."""


def _number(low: float, high: float, whole: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        # Digits only: the text goes on to the shell as it was given, and Python reads more than the shell does.
        if not re.fullmatch(r"[0-9]{1,12}" if whole else r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
            raise ValueError
        value = int(text) if whole else float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return parse


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _subnet(text: str) -> str:
    network = ipaddress.IPv4Network(text)
    if text and not 8 <= network.prefixlen <= 28:
        raise ValueError
    return str(network)


@dataclass(frozen=True)
class Setting:
    default: str
    parse: Callable[[str], Any]
    allowed: str
    meaning: str


_PORT = _number(1, 65535, whole=True)
_IMAGE = _matching(r"[\w][\w./:@-]*")

SETTINGS: Mapping[str, Setting] = {
    "project": Setting(
        "lbscaler", _matching(r"[a-z0-9][a-z0-9_-]{0,39}"), "a-z 0-9 _ -, 40 at most", "name of this installation"
    ),
    "bind": Setting("0.0.0.0", _address, "an IPv4 address of this host", "address the service is published on"),
    "port": Setting("8000", _PORT, "1 to 65535", "port the service is published on"),
    "manager_port": Setting("5000", _PORT, "1 to 65535", "port of the manager's page and of the reports"),
    "min": Setting("2", _number(1, 1000, whole=True), "1 to 1000", "fewest backends"),
    "max": Setting("10", _number(1, 1000, whole=True), "1 to 1000", "most backends"),
    "spares": Setting("0", _number(0, 100, whole=True), "0 to 100", "ready backends kept out of rotation"),
    "metric": Setting(
        "packets",
        _matching("packets|connections|concurrency"),
        "packets, connections or concurrency",
        "what is counted",
    ),
    "target": Setting(
        "100", _number(0.001, 1e9), "a number above 0", "per backend: per second, or open connections for concurrency"
    ),
    "interval": Setting("2", _number(0.5, 60), "0.5 to 60 (seconds)", "time between reports"),
    "stable_window": Setting("60", _number(1, 3600), "1 to 3600 (seconds)", "a shrink waits until this long agrees"),
    "panic_window": Setting("6", _number(1, 600), "1 to 600 (seconds)", "the load is averaged over this long"),
    "drain_timeout": Setting("30", _number(0, 3600), "0 to 3600 (seconds)", "longest wait for a leaver's connections"),
    "weights": Setting(
        "adaptive",
        _matching("adaptive|equal"),
        "adaptive or equal",
        "shares that follow the backends' speed, or 1/n each",
    ),
    "image": Setting("", lambda text: _IMAGE(text) if text else "", "an image's name", "what the backends run"),
    "backend_port": Setting("8000", _PORT, "1 to 65535", "port the backends listen on"),
    "health": Setting("sync", _matching(r"sync|tcp|http:/\S*"), "sync, tcp or http:/path", "how backends are probed"),
    "subnet": Setting(
        "", lambda text: _subnet(text) if text else "", "an IPv4 network such as 198.18.0.0/20", "the backends' network"
    ),
    "preserve_client_ip": Setting("", _matching("|1"), "1, or nothing", "backends see their clients' own addresses"),
    "record": Setting("", _matching("|1"), "1, or nothing", "keep a trace of the load, for replay"),
    "orchestrator": Setting("docker", _matching("docker"), "docker", "who runs the backends"),
    "base_image": Setting("debian:trixie-slim", _IMAGE, "an image's name", "what the images are built on"),
}


@dataclass(frozen=True)
class Settings:
    """Times in seconds; `target` in packets or connections per second and backend, or in open connections."""

    project: str
    bind: str
    port: int
    manager_port: int
    min: int
    max: int
    spares: int
    metric: str
    target: float
    interval: float
    stable_window: float
    panic_window: float
    drain_timeout: float
    weights: str
    image: str
    backend_port: int
    health: str
    subnet: str
    preserve_client_ip: str
    record: str
    orchestrator: str
    base_image: str

    @property
    def run_dir(self) -> Path:
        return ROOT / "run" / self.project


def variable(name: str) -> str:
    return f"LB_{name.upper()}"


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read(environ: Mapping[str, str]) -> Settings:
    """The settings in LB_… variables; raises SettingError for the first bad one."""
    values = {}
    for name, setting in SETTINGS.items():
        text = environ.get(variable(name), setting.default)
        try:
            values[name] = setting.parse(text)
        except ValueError:
            raise SettingError(f"{flag(name)} ({variable(name)}) is {text!r}; allowed: {setting.allowed}") from None
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _check_together(s: Settings) -> None:
    if s.min > s.max:
        raise SettingError(f"--min {s.min} is above --max {s.max}; raise the one or lower the other")
    if s.port == s.manager_port:
        raise SettingError(f"--port and --manager-port are both {s.port}; move one of them")
    if not s.interval <= s.panic_window <= s.stable_window:
        raise SettingError(
            f"--interval {s.interval:g}, --panic-window {s.panic_window:g} and --stable-window {s.stable_window:g} "
            "must not shrink in this order"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}; ./run.sh --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Brings the load balancer up, or applies changed settings to the one that runs.",
        epilog="Every setting can also be given as a variable: --max 20 is LB_MAX=20.\n"
        "Exit codes: 0 it serves, 1 a step failed, 2 a bad setting, 130 interrupted.",
    )
    parser.add_argument("backends", nargs="?", help="how many backends to begin with (default: --min)")
    parser.add_argument("--follow", action="store_true", help="stay and show the manager's log")
    parser.add_argument("--no-install", action="store_true", help="install nothing on this host; say what is missing")
    for name, setting in SETTINGS.items():
        default = f" (default: {setting.default})" if setting.default else ""
        parser.add_argument(flag(name), metavar=name.upper(), help=f"{setting.meaning}; {setting.allowed}{default}")
    return parser


def _started_with(environ: Mapping[str, str]) -> dict[str, str]:
    """What the running project was started with; nothing when it does not run or the file cannot be read."""
    project = environ.get(variable("project"), SETTINGS["project"].default)
    try:
        stored = json.loads((ROOT / "run" / project / "settings.json").read_text())
        return {str(name): str(value) for name, value in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def assignments(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Everything run.sh needs, as variables, from its arguments and environment. Raises SettingError."""
    parsed = vars(_parser().parse_args(arguments))
    given = {k: v for k, v in environ.items() if k.startswith("LB_")}
    given |= {variable(name): parsed[name] for name in SETTINGS if parsed[name] is not None}
    merged = _started_with(given) | given
    settings = read(merged)
    backends = parsed["backends"]
    if backends is not None and not (backends.isdecimal() and settings.min <= int(backends) <= settings.max):
        raise SettingError(
            f"the number of backends is {backends!r}; allowed: {settings.min} (--min) to {settings.max} (--max)"
        )
    known = {variable(name): merged.get(variable(name), setting.default) for name, setting in SETTINGS.items()}
    return known | {
        "FOLLOW": "1" if parsed["follow"] else "",
        "NO_INSTALL": "1" if parsed["no_install"] else "",
        "BACKENDS": backends or "",
    }


def stored(environ: Mapping[str, str], image: str) -> str:
    """The text of settings.json: what the project was started with, and the image its backends run."""
    values = {variable(name): environ.get(variable(name), setting.default) for name, setting in SETTINGS.items()}
    return json.dumps({**values, "backend_image": image}, indent=1)


def main() -> int:
    if sys.argv[1:2] == ["--store"]:
        print(stored(os.environ, sys.argv[2]))
        return 0
    try:
        for name, value in assignments(sys.argv[1:], os.environ).items():
            print(f"{name}={shlex.quote(value)}")
    except SettingError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
