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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]


class SettingError(ValueError):
    """A value that cannot be used; the message names it, what was given and what is allowed."""


def _number(low: float, high: float, whole: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        # Digits only: the text goes on to the shell as it was given, and Python reads more than the shell does.
        if not re.fullmatch(r"0|[1-9][0-9]{0,11}" if whole else r"(0|[1-9][0-9]{0,11})(\.[0-9]{1,9})?", text):
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


def _choice(*words: str) -> tuple[Callable[[str], str], str]:
    """One of the words, and how that is told."""
    return _matching("|".join(words)), f"{', '.join(words[:-1])} or {words[-1]}"


def _or_none(parse: Callable[[str], Any], none: Any = "") -> Callable[[str], Any]:
    """Nothing at all is a value, too."""
    return lambda text: parse(text) if text else none


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _subnet(text: str) -> str:
    network = ipaddress.IPv4Network(text)
    if not 8 <= network.prefixlen <= 28:
        raise ValueError
    return str(network)


def _words(pattern: str) -> Callable[[str], tuple[str, ...]]:
    """Any number of words, quoted as in a shell, each of the pattern."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(shlex.split(text))
        if not all(re.fullmatch(pattern, word, re.DOTALL) for word in words):
            raise ValueError
        return words

    return parse


def _names(*names: str) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        chosen = frozenset(text.replace(",", " ").split())
        if not chosen <= set(names):
            raise ValueError
        return chosen

    return parse


@dataclass(frozen=True)
class Setting:
    default: str
    parse: Callable[[str], Any]
    allowed: str
    meaning: str
    many: bool = False  # the flag may be given again and again; the variable holds all, quoted as in a shell


def _setting(default: str, parse: Callable[[str], Any], allowed: str, meaning: str, many: bool = False) -> Any:
    return field(metadata={"setting": Setting(default, parse, allowed, meaning, many)})


_PORT = _number(1, 65535, whole=True)
_IMAGE = _matching(r"[\w][\w./:@-]*")


@dataclass(frozen=True)
class Settings:
    """All there is to set, each said once. Times in seconds; `target` in packets or connections per second and backend,
    or in open connections."""

    project: str = _setting(
        "lbscaler", _matching(r"[a-z0-9][a-z0-9_-]{0,39}"), "a-z 0-9 _ -, 40 at most", "name of this installation"
    )
    bind: str = _setting("0.0.0.0", _address, "an IPv4 address of this host", "address the service is published on")
    port: int = _setting("8000", _PORT, "1 to 65535", "port the service is published on")
    manager_port: int = _setting("5000", _PORT, "1 to 65535", "port of the manager's page and of the reports")
    min: int = _setting("2", _number(1, 1000, whole=True), "1 to 1000", "fewest backends")
    max: int = _setting("10", _number(1, 1000, whole=True), "1 to 1000", "most backends")
    spares: int = _setting("0", _number(0, 100, whole=True), "0 to 100", "ready backends kept out of rotation")
    metric: str = _setting("packets", *_choice("packets", "connections", "concurrency"), "what is counted")
    target: float = _setting(
        "100", _number(0.001, 1e9), "a number above 0", "per backend: per second, or open connections for concurrency"
    )
    interval: float = _setting("2", _number(0.5, 60), "0.5 to 60 (seconds)", "time between reports")
    stable_window: float = _setting(
        "60", _number(1, 3600), "1 to 3600 (seconds)", "a shrink waits until this long agrees"
    )
    panic_window: float = _setting("6", _number(1, 600), "1 to 600 (seconds)", "the load is averaged over this long")
    drain_timeout: float = _setting(
        "30", _number(0, 3600), "0 to 3600 (seconds)", "longest wait for a leaver's connections"
    )
    ready_timeout: float = _setting(
        "60", _number(1, 3600), "1 to 3600 (seconds)", "longest time a launched backend may take to get ready"
    )
    weights: str = _setting(
        "adaptive", *_choice("adaptive", "equal"), "shares that follow the backends' speed, or 1/n each"
    )
    image: str = _setting("", _or_none(_IMAGE), "an image's name", "what the backends run")
    backend_port: int = _setting("8000", _PORT, "1 to 65535", "port the backends listen on")
    health: str = _setting(
        "",
        _or_none(_matching(r"sync|tcp|http:/\S*"), "sync"),
        "sync, tcp or http:/path",
        "how backends are probed; unless said, sync for the sample server and tcp for another image",
    )
    env: tuple[str, ...] = _setting(
        "", _words(r"[A-Za-z_]\w*=.*"), "NAME=VALUE", "a variable for the backends", many=True
    )
    command: tuple[str, ...] = _setting(
        "", _words(r".*"), "words, quoted as in a shell", "what the backends run instead of the image's"
    )
    memory: str = _setting(
        "256m", _matching(r"[1-9]\d{0,8}[kmg]"), "a size such as 256m or 2g", "memory of each backend"
    )
    cpus: float = _setting("", _or_none(_number(0.01, 1000), 0.0), "0.01 to 1000", "processors each backend may use")
    tmpfs: tuple[str, ...] = _setting(
        "", _words(r"/[^:,\s]+"), "an absolute path", "a place backends may write to, besides /tmp", many=True
    )
    volume: tuple[str, ...] = _setting(
        "",
        _words(r"[/\w][^:]*:/[^:]*(:r[ow])?"),
        "HOST-PATH:PATH, :ro or :rw at its end",
        "a directory shown to the backends, read-only unless :rw",
        many=True,
    )
    allow: frozenset[str] = _setting(
        "",
        _names("write", "root", "capabilities", "privileges"),
        "write, root, capabilities, privileges, with commas",
        "rules of least privilege to lift for the backends",
    )
    subnet: str = _setting("", _or_none(_subnet), "an IPv4 network such as 198.18.0.0/20", "the backends' network")
    preserve_client_ip: str = _setting(
        "", _or_none(_matching("1")), "1, or nothing", "backends see their clients' own addresses"
    )
    record: str = _setting("", _or_none(_matching("1")), "1, or nothing", "keep a trace of the load, for replay")
    orchestrator: str = _setting(
        "docker", *_choice("docker", "swarm"), "who runs the backends: this host's engine, or a Swarm"
    )
    registry: str = _setting(
        "", _or_none(_matching(r"[\w.-]+(:\d+)?")), "HOST or HOST:PORT", "where a Swarm's nodes get the images from"
    )
    advertise: str = _setting("", _or_none(_address), "an IPv4 address of this host", "its address among the nodes")
    constraint: tuple[str, ...] = _setting(
        "", _words(r"[^=!]+(==|!=).+"), "KEY==VALUE or KEY!=VALUE", "nodes the backends may be on", many=True
    )
    spread: tuple[str, ...] = _setting(
        "", _words(r"[\w.-]+"), "such as node.labels.zone", "what backends are spread over", many=True
    )
    balancer_constraint: tuple[str, ...] = _setting(
        "", _words(r"[^=!]+(==|!=).+"), "KEY==VALUE or KEY!=VALUE", "nodes that have a balancer", many=True
    )
    locality: str = _setting(
        "", _or_none(_matching("prefer")), "prefer, or nothing", "balancers prefer the backends on their own node"
    )
    base_image: str = _setting("debian:trixie-slim", _IMAGE, "an image's name", "what the images are built on")

    @property
    def run_dir(self) -> Path:
        return ROOT / "run" / self.project


SETTINGS: Mapping[str, Setting] = {one.name: one.metadata["setting"] for one in fields(Settings)}

# What run.sh does instead of bringing anything up.
ACTIONS = {
    "status": "print the state of the running project, and end: 0 healthy, 1 it does not run, 3 degraded",
    "watch": "show it live, until Ctrl-C",
    "json": "with --status or --doctor: for programs",
    "doctor": "look this host over: what would stop run.sh, and the mend beside it",
}


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
    if s.orchestrator == "swarm" and (s.spares or s.preserve_client_ip or s.bind != "0.0.0.0"):
        raise SettingError("--spares, --preserve-client-ip and --bind are for --orchestrator docker; leave them out")
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
        "Exit codes: 0 it serves, 1 a step failed and was undone, 2 a bad setting, 129, 130, 143 ended by a signal.",
    )
    parser.add_argument("backends", nargs="?", help="how many backends to begin with (default: --min)")
    parser.add_argument("--follow", action="store_true", help="stay and show the manager's log")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the end of an update of the backends")
    parser.add_argument("--swarm-init", action="store_true", help="make a Swarm of this host where there is none")
    parser.add_argument("--no-install", action="store_true", help="install nothing on this host; say what is missing")
    for name, meaning in ACTIONS.items():
        parser.add_argument(flag(name), action="store_true", help=meaning)
    for name, setting in SETTINGS.items():
        default = f" (default: {setting.default})" if setting.default else ""
        action = "append" if setting.many else "store"
        parser.add_argument(
            flag(name), action=action, metavar=name.upper(), help=f"{setting.meaning}; {setting.allowed}{default}"
        )
    return parser


def _text(value: str | list[str]) -> str:
    """A flag's value as its variable has it."""
    return value if isinstance(value, str) else shlex.join(word for word in value if word)


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
    given |= {variable(name): _text(parsed[name]) for name in SETTINGS if parsed[name] is not None}
    merged = _started_with(given) | given
    settings = read(merged)
    backends = parsed["backends"]
    if backends is not None and not (backends.isdecimal() and settings.min <= int(backends) <= settings.max):
        raise SettingError(
            f"the number of backends is {backends!r}; allowed: {settings.min} (--min) to {settings.max} (--max)"
        )
    known = {variable(name): merged.get(variable(name), setting.default) for name, setting in SETTINGS.items()}
    # Words are quoted anew, so that a shell that reads them finds words and nothing to carry out.
    known |= {variable(name): shlex.join(value) for name, value in vars(settings).items() if isinstance(value, tuple)}
    return known | {
        "ACTION": " ".join(name for name in ACTIONS if parsed[name]),
        "SWARM_INIT": "1" if parsed["swarm_init"] else "",
        "FOLLOW": "1" if parsed["follow"] else "",
        "NO_WAIT": "1" if parsed["no_wait"] else "",
        "NO_INSTALL": "1" if parsed["no_install"] else "",
        "BACKENDS": backends or "",
    }


def stored(environ: Mapping[str, str], image: str, balancer_image: str, code: str) -> str:
    """The text of settings.json: what the project was started with, both images, and the manager's digest."""
    values = {variable(name): environ.get(variable(name), setting.default) for name, setting in SETTINGS.items()}
    images = {"backend_image": image, "balancer_image": balancer_image}
    return json.dumps({**values, **images, "manager": code}, indent=1)


def store(path: Path, text: str) -> None:
    """Replaces the file, mode 0600, in one step: whoever reads it sees the old text or the new one. Raises OSError."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def main() -> int:
    """`--print IMAGE BALANCER-IMAGE CODE` prints what `--store FILE` writes from standard input; else: see above."""
    if sys.argv[1:2] == ["--print"]:
        print(stored(os.environ, *sys.argv[2:5]))
        return 0
    if sys.argv[1:2] == ["--store"]:
        path = Path(sys.argv[2])
        try:
            store(path, sys.stdin.read())
        except OSError as error:
            print(f"run.sh: cannot write {path}: {error.strerror}", file=sys.stderr)
            return 1
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
