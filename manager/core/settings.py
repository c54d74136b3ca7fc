"""The settings: one table of all of them, and the functions that turn text into one frozen, validated value.

The text comes from flags and LB_ variables. An invalid one raises SettingError, whose message is one line. This module
uses the standard library only, because run.sh checks the settings before the virtual environment exists.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

VERSION = "1.0.0"
ROOT = Path(__file__).resolve().parents[2]
RESTRICTIONS = frozenset({"write", "root", "capabilities", "privileges", "processes", "tmp"})  # --allow lifts them


class SettingError(ValueError):
    """A value that cannot be used; the message names the setting, the value and what is allowed."""


# -- parsers: a text in, a value out; ValueError for a text that is not allowed ---------------------------------------


def _number(low: float, high: float, whole: bool = False) -> Callable[[str], Any]:
    # Plain digits only, so that a value has one spelling and stored texts can be compared.
    pattern = r"0|[1-9][0-9]{0,11}" if whole else r"(0|[1-9][0-9]{0,11})(\.[0-9]{1,9})?"

    def parse(text: str) -> Any:
        value = int(_matching(pattern)(text)) if whole else float(_matching(pattern)(text))
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


def _or_empty(parse: Callable[[str], Any], empty: Any = "") -> Callable[[str], Any]:
    """The same parser, which also accepts an empty text and then returns `empty`."""
    return lambda text: parse(text) if text else empty


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _subnet(text: str) -> str:
    # A network smaller than /28 would have too few addresses for backends.
    network = ipaddress.IPv4Network(text)
    if not 8 <= network.prefixlen <= 28:
        raise ValueError
    return str(network)


def _list(pattern: str) -> Callable[[str], tuple[str, ...]]:
    """A list in one text, quoted as in a shell; each item matches the pattern."""

    def parse(text: str) -> tuple[str, ...]:
        items = tuple(shlex.split(text))
        for item in items:
            if not re.fullmatch(pattern, item, re.DOTALL):
                raise ValueError
        return items

    return parse


def _set_of(*names: str) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        chosen = frozenset(text.replace(",", " ").split())
        if not chosen <= set(names):
            raise ValueError
        return chosen

    return parse


def _restrictions(text: str) -> frozenset[str]:
    chosen = _set_of(*RESTRICTIONS, "all")(text)
    return RESTRICTIONS if "all" in chosen else chosen


def _published(text: str) -> tuple[str, ...]:
    """Pairs of ports. The ports of the service are all different."""
    pairs = _list(r"[1-9]\d{0,4}:[1-9]\d{0,4}")(text)
    ports = [int(port) for pair in pairs for port in pair.split(":")]
    if len(set(ports[::2])) < len(pairs) or max(ports, default=1) > 65535:
        raise ValueError
    return pairs


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One row of the table. `allowed` and `meaning` are texts for people, `group` is the section of --help and of
    docs/settings.md."""

    group: str
    default: str
    parse: Callable[[str], Any]
    allowed: str
    meaning: str
    many: bool = False  # the flag may be given several times; the variable holds all values, quoted as in a shell


def _row(*columns: Any) -> Any:
    return field(metadata={"setting": Setting(*columns)})


_PROJECT = _matching(r"[a-z0-9][a-z0-9_-]{0,39}")
_PORT, _PORT_RANGE = _number(1, 65535, whole=True), "1 to 65535"
_COUNT, _COUNT_RANGE = _number(1, 1000, whole=True), "1 to 1000"
_SECONDS, _SECONDS_RANGE = _number(1, 3600), "1 to 3600 (seconds)"
_IMAGE, _IMAGE_FORM = _matching(r"[\w][\w./:@-]*"), "an image's name"
_METRIC = _matching("packets|connections|concurrency")
_HEALTH = _or_empty(_matching(r"sync|tcp|http:/\S{0,200}"), "sync")  # reports name it, and their texts have a limit
_MEMORY = _matching(r"[1-9]\d{0,8}[kmg]")
_VOLUME = _list(r"[/\w][^:]*:/[^:]*(:r[ow])?")
_SECRET = _list(r"\w[\w.-]*=/.+")
_ADDED_HOST = _list(r"[\w.-]+:(host-gateway|\d+(\.\d+){3})")
_ALLOW_FORM = "write, root, capabilities, privileges, processes and tmp, with commas; or all"
_ON = _or_empty(_matching("1"))
_REGISTRY = _or_empty(_matching(r"[\w.-]+(:\d+)?"))
_CONSTRAINT, _CONSTRAINT_FORM = _list(r"[^=!]+(==|!=).+"), "KEY==VALUE or KEY!=VALUE"

_SERVICE, _SCALING, _BACKENDS, _SWARM, _OTHER = "Service", "Scaling", "Backends", "Swarm", "Other"


# fmt: off
@dataclass(frozen=True)
class Settings:
    """The value of every setting. Times are in seconds. `target` is in packets or connections per second and backend,
    or in open connections per backend."""

    project: str = _row(_SERVICE, "lbscaler", _PROJECT, "a-z 0-9 _ -, 40 at most", "name of this installation")
    bind: str = _row(_SERVICE, "0.0.0.0", _address, "an IPv4 address of this host", "address of the service")
    port: int = _row(_SERVICE, "8000", _PORT, _PORT_RANGE, "port of the service")
    manager_port: int = _row(_SERVICE, "5000", _PORT, _PORT_RANGE, "port of the manager's page and API")
    subnet: str = _row(_SERVICE, "", _or_empty(_subnet), "an IPv4 network such as 198.18.0.0/20",
                       "network of the backends; without it, a free one is chosen")
    publish: tuple[str, ...] = _row(_SERVICE, "", _published, "PORT:BACKEND-PORT, each 1 to 65535",
                                    "a port of the service and the backends' port; replaces --port and --backend-port",
                                    True)
    datapath: str = _row(_SERVICE, "bridge", _matching("bridge|host"), "bridge or host",
                         "where the rules are: in the balancer's network namespace, or in this host's")
    sticky: int = _row(_SERVICE, "0", _number(0, 86400, whole=True), "0 to 86400 (seconds)",
                       "time for which a client keeps its backend; 0: each connection may go to another")

    min: int = _row(_SCALING, "2", _COUNT, _COUNT_RANGE, "fewest backends")
    max: int = _row(_SCALING, "10", _COUNT, _COUNT_RANGE, "most backends")
    spares: int = _row(_SCALING, "0", _number(0, 100, whole=True), "0 to 100", "ready backends kept out of rotation")
    metric: str = _row(_SCALING, "packets", _METRIC, "packets, connections or concurrency", "the load that is measured")
    target: float = _row(_SCALING, "100", _number(0.001, 1e9), "0.001 to 1000000000",
                         "load per backend: per second, or open connections for concurrency")
    interval: float = _row(_SCALING, "2", _number(0.5, 60), "0.5 to 60 (seconds)", "time between reports")
    stable_window: float = _row(_SCALING, "60", _SECONDS, _SECONDS_RANGE, "time of low load before a scale-in")
    panic_window: float = _row(_SCALING, "6", _number(1, 600), "1 to 600 (seconds)", "time the load is averaged over")
    weights: str = _row(_SCALING, "adaptive", _matching("adaptive|equal"), "adaptive or equal",
                        "shares that follow the backends' speed, or 1/n each")
    record: str = _row(_SCALING, "", _ON, "1, or nothing", "record the load, for a replay")

    image: str = _row(_BACKENDS, "", _or_empty(_IMAGE), _IMAGE_FORM, "image of the backends; without it, the sample")
    backend_port: int = _row(_BACKENDS, "8000", _PORT, _PORT_RANGE, "port the backends listen on")
    health: str = _row(_BACKENDS, "", _HEALTH, "sync, tcp or http:/path",
                       "how backends are probed; default: sync for the sample server, tcp for another image")
    env: tuple[str, ...] = _row(_BACKENDS, "", _list(r"[A-Za-z_]\w*=.*"), "NAME=VALUE", "an environment variable", True)
    env_file: tuple[str, ...] = _row(_BACKENDS, "", _list(r"/.+"), "an absolute path",
                                     "a file of environment variables, one NAME=VALUE a line", True)
    secret: tuple[str, ...] = _row(_BACKENDS, "", _SECRET, "NAME=PATH, an absolute path",
                                   "a file that only the backends' user may read, at /run/secrets/NAME", True)
    attach: tuple[str, ...] = _row(_BACKENDS, "", _list(r"\w[\w.-]*"), "a network's name",
                                   "another network for the backends to join, such as that of their database", True)
    add_host: tuple[str, ...] = _row(_BACKENDS, "", _ADDED_HOST, "NAME:ADDRESS or NAME:host-gateway",
                                     "a line of the backends' /etc/hosts", True)
    label: tuple[str, ...] = _row(_BACKENDS, "", _list(r"(?!lbscaler\.)[^=\s]+=.*"), "NAME=VALUE, not lbscaler.…",
                                  "a label of the backends' containers", True)
    command: tuple[str, ...] = _row(_BACKENDS, "", _list(r".*"), "arguments, quoted as in a shell",
                                    "command to run instead of the image's")
    memory: str = _row(_BACKENDS, "256m", _MEMORY, "a size such as 256m or 2g", "memory limit of each backend")
    cpus: float = _row(_BACKENDS, "", _or_empty(_number(0.01, 1000), 0.0), "0.01 to 1000", "CPU limit of each backend")
    tmpfs: tuple[str, ...] = _row(_BACKENDS, "", _list(r"/[^:,\s]+"), "an absolute path",
                                  "a writable directory in memory, besides /tmp", True)
    volume: tuple[str, ...] = _row(_BACKENDS, "", _VOLUME, "HOST-PATH:PATH, :ro or :rw at its end",
                                   "a directory of the host to mount, read-only unless :rw", True)
    ulimit: str = _row(_BACKENDS, "", _or_empty(_matching(r"nofile=[1-9]\d{0,8}")), "nofile=NUMBER",
                       "how many files each process of a backend may open")
    allow: frozenset[str] = _row(_BACKENDS, "", _restrictions, _ALLOW_FORM, "restrictions to lift from the backends")
    drain_timeout: float = _row(_BACKENDS, "30", _number(0, 3600), "0 to 3600 (seconds)",
                                "longest wait for the open connections of a draining backend")
    ready_timeout: float = _row(_BACKENDS, "60", _SECONDS, _SECONDS_RANGE, "longest time for a backend to become ready")

    orchestrator: str = _row(_SWARM, "docker", _matching("docker|swarm"), "docker or swarm",
                             "what runs the backends: this host's engine, or a Swarm")
    registry: str = _row(_SWARM, "", _REGISTRY, "HOST or HOST:PORT", "registry that the nodes pull the images from")
    advertise: str = _row(_SWARM, "", _or_empty(_address), "an IPv4 address of this host",
                          "address that the other nodes reach this host at")
    constraint: tuple[str, ...] = _row(_SWARM, "", _CONSTRAINT, _CONSTRAINT_FORM, "nodes that may run backends", True)
    spread: tuple[str, ...] = _row(_SWARM, "", _list(r"[\w.-]+"), "such as node.labels.zone",
                                   "node label: the backends are spread over its values", True)
    balancer_constraint: tuple[str, ...] = _row(_SWARM, "", _CONSTRAINT, _CONSTRAINT_FORM,
                                                "nodes that run a balancer", True)
    locality: str = _row(_SWARM, "", _or_empty(_matching("prefer")), "prefer, or nothing",
                         "balancers prefer the backends on their own node")

    base_image: str = _row(_OTHER, "debian:trixie-slim", _IMAGE, _IMAGE_FORM, "base of the images that are built")

    @property
    def ports(self) -> tuple[tuple[int, int], ...]:
        """Each port of the service, and the backends' port that it leads to."""
        if not self.publish:
            return ((self.port, self.backend_port),)
        pairs = [pair.split(":") for pair in self.publish]
        return tuple((int(port), int(backend_port)) for port, backend_port in pairs)

    @property
    def run_dir(self) -> Path:
        return ROOT / "run" / self.project
# fmt: on


SETTINGS: Mapping[str, Setting] = {one.name: one.metadata["setting"] for one in fields(Settings)}


def variable(name: str) -> str:
    return f"LB_{name.upper()}"


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read(environ: Mapping[str, str]) -> Settings:
    """The settings in LB_ variables, with the defaults for the others. Raises SettingError for an invalid one."""
    values = {name: parse(name, environ.get(variable(name), setting.default)) for name, setting in SETTINGS.items()}
    settings = Settings(**values)
    port, backend_port = settings.ports[0]
    settings = replace(settings, port=port, backend_port=backend_port)
    check_together(settings)
    return settings


def parse(name: str, text: str) -> Any:
    """The value of one setting. Raises SettingError."""
    setting = SETTINGS[name]
    try:
        return setting.parse(text)
    # The parser's error is left out, because the message already says what is allowed.
    except ValueError:
        raise SettingError(f"{flag(name)} ({variable(name)}) is {text!r}; allowed: {setting.allowed}") from None


def check_together(s: Settings) -> None:
    """Raises SettingError if settings that are valid alone do not fit together."""
    if s.min > s.max:
        raise SettingError(f"--min {s.min} is above --max {s.max}; raise the one or lower the other")
    if s.manager_port in dict(s.ports):
        raise SettingError(f"the service and --manager-port both have port {s.manager_port}; change one of them")
    if s.project in s.attach:
        raise SettingError(f"--attach {s.project} is the project's own network; leave it out")
    # In a Swarm, every node publishes the port on all its addresses, and Swarm decides where backends run. They are on
    # an overlay network, which has no interface on the host.
    if s.orchestrator == "swarm" and (s.spares or s.datapath == "host" or s.bind != "0.0.0.0"):
        raise SettingError("--spares, --datapath host and --bind are for --orchestrator docker; leave them out")
    # A window that is shorter than the interval would average over one report only.
    if not s.interval <= s.panic_window <= s.stable_window:
        raise SettingError(
            f"--interval {s.interval:g}, --panic-window {s.panic_window:g} and --stable-window {s.stable_window:g} "
            "must not decrease in this order"
        )


def chain_prefix(project: str) -> str:
    """The beginning of the names of this project's chains and sets in the host's namespace. A chain's name has at most
    28 characters, and the rest of ours has up to 18."""
    return f"LB-{hashlib.sha256(project.encode()).hexdigest()[:6]}-"


# -- the settings of the running project ------------------------------------------------------------------------------


def stored(project: str) -> dict[str, str]:
    """The content of run/<project>/settings.json: the variables that the running project was started with, and what it
    was built from. Empty if the project does not run or the file cannot be read."""
    try:
        values = json.loads((ROOT / "run" / project / "settings.json").read_text())
        return {str(name): str(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def with_stored(environ: Mapping[str, str]) -> dict[str, str]:
    """Every LB_ variable of a setting: from `environ`, else from the running project, else its default."""
    running = stored(environ.get(variable("project"), SETTINGS["project"].default))
    result = {}
    for name, setting in SETTINGS.items():
        key = variable(name)
        result[key] = environ.get(key, running.get(key, setting.default))
    return result
