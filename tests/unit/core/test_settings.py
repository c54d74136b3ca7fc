"""Settings: their defaults, what is refused and with which message, and which value applies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core import settings
from core.settings import RESTRICTIONS, SETTINGS, SettingError, chain_prefix, flag, read, stored, variable, with_stored

PORT = "1 to 65535"
# name: what is allowed, for people; values that are refused
REFUSED: dict[str, tuple[str, list[str]]] = {
    "project": ("a-z 0-9 _ -, 40 at most", ["", "A", "-x", "a.b", "a b", "../x", "a\nb", "a\n", "a" * 41, "é"]),
    "bind": ("an IPv4 address of this host", ["", "localhost", "1.2.3", "1.2.3.256", "::1", "0.0.0.0/0"]),
    "port": (PORT, ["", "0", "08000", "65536", "-1", "80.5", "http", "0x50", "8_0", " 80", "80\n", "+80", "٨٠"]),
    "manager_port": (PORT, ["0", "65536", "x"]),
    "min": ("1 to 1000", ["", "0", "1001", "2.5", "two", "nan"]),
    "max": ("1 to 1000", ["0", "1001", "-3"]),
    "spares": ("0 to 100", ["", "-1", "101", "1.5", "some"]),
    "metric": ("packets, connections or concurrency", ["", "bytes", "PACKETS", "packets "]),
    "target": (
        "0.001 to 1000000000",
        ["", "0.0005", "1000000001", "0", "-1", "nan", "inf", "1e3", "1_0", " 7", "7\n", "٧", "many"],
    ),
    "interval": ("0.5 to 60 (seconds)", ["", "0.4", "61", "nan", "2s"]),
    "stable_window": ("1 to 3600 (seconds)", ["0.9", "3601", "-inf"]),
    "panic_window": ("1 to 600 (seconds)", ["0.9", "601", "x"]),
    "drain_timeout": ("0 to 3600 (seconds)", ["", "08", "010", "-1", "3601", "soon"]),
    "ready_timeout": ("1 to 3600 (seconds)", ["", "0", "0.9", "3601", "soon", "1e3"]),
    "weights": ("adaptive or equal", ["", "fast", "1"]),
    "image": ("an image's name", ["-rm", "a b", "a;b", "$(x)", "/x"]),
    "backend_port": (PORT, ["0", "65536", "x"]),
    "health": ("sync, tcp or http:/path", ["http", "http:path", "http:/a b", "udp"]),
    "env": ("NAME=VALUE", ["A", "=1", "1A=2", "a-b=c"]),
    "command": ("arguments, quoted as in a shell", ["'", 'a "b']),
    "memory": ("a size such as 256m or 2g", ["", "0m", "256", "256MB", "-1m", "1.5g", "m"]),
    "cpus": ("0.01 to 1000", ["0", "0.001", "1001", "one", "-1"]),
    "tmpfs": ("an absolute path", ["run", "/a:size=1", "/a,/b"]),
    "volume": ("HOST-PATH:PATH, :ro or :rw at its end", ["/a", "/a:b", "/a:/b:z", ":/b", "/a:/b:ro:rw"]),
    "env_file": ("an absolute path", ["a.env", "./a.env", "'"]),
    "secret": (
        "NAME=PATH, an absolute path",
        ["a", "a=", "a=b", "=/b", "../a=/b", "a/b=/c"],
    ),
    "attach": ("a network's name", ["-x", "a/b", "a;b"]),
    "add_host": ("NAME:ADDRESS or NAME:host-gateway", ["db", "db:", ":1.2.3.4", "db:1.2.3", "db:other-host"]),
    "label": ("NAME=VALUE, not lbscaler.…", ["a", "=b", "lbscaler.project=q", "'a b=c'"]),
    "ulimit": (
        "nofile=NUMBER",
        ["nofile", "nofile=", "nproc=1", "nofile=0", "nofile=-1", "nofile=1:2"],
    ),
    "allow": (
        "write, root, capabilities, privileges, processes and tmp, with commas; or all",
        ["everything", "Root", "write;root", "write,no"],
    ),
    "subnet": (
        "an IPv4 network such as 198.18.0.0/20",
        ["x", "198.18.0.1/20", "0.0.0.0/0", "10.0.0.0/29", "fd00::/64"],
    ),
    "datapath": ("bridge or host", ["Host", "overlay", " "]),
    "sticky": ("0 to 86400 (seconds)", ["-1", "86401", "1h", "0.5"]),
    "publish": ("PORT:BACKEND-PORT, each 1 to 65535", ["80", "80:", "0:80", "80:65536", "80:8080 80:8081", "a:b"]),
    "record": ("1, or nothing", ["0", "yes", " "]),
    "orchestrator": ("docker or swarm", ["", "k8s", "Swarm"]),
    "registry": ("HOST or HOST:PORT", ["a/b", "a:b", ":5000", "http://a", "a b"]),
    "advertise": ("an IPv4 address of this host", ["eth0", "1.2.3", "::1"]),
    "constraint": ("KEY==VALUE or KEY!=VALUE", ["node.role", "node.role=worker", "==x"]),
    "spread": ("such as node.labels.zone", ["node.labels.zone==a", "a/b"]),
    "balancer_constraint": ("KEY==VALUE or KEY!=VALUE", ["node.role", "==x"]),
    "locality": ("prefer, or nothing", ["always", "Prefer"]),
    "base_image": ("an image's name", ["", "-x", "a b"]),
}


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place instead of the repository's root."""
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    return tmp_path


def test_defaults() -> None:
    assert vars(read({})) == {
        **{"weights": "adaptive", "datapath": "bridge", "sticky": 0, "publish": ()},
        **{"project": "lbscaler", "bind": "0.0.0.0", "port": 8000, "manager_port": 5000, "min": 2, "max": 10},
        **{"spares": 0, "record": ""},
        **{"metric": "packets", "target": 100, "interval": 2, "stable_window": 60, "panic_window": 6},
        **{"drain_timeout": 30, "ready_timeout": 60, "image": "", "backend_port": 8000, "health": "sync", "subnet": ""},
        **{"orchestrator": "docker", "base_image": "debian:trixie-slim"},
        **{"env": (), "command": (), "memory": "256m", "cpus": 0, "tmpfs": (), "volume": (), "allow": frozenset()},
        **{"env_file": (), "secret": (), "attach": (), "add_host": (), "label": (), "ulimit": ""},
        **{"registry": "", "advertise": "", "constraint": (), "spread": (), "balancer_constraint": (), "locality": ""},
    }
    assert read({}).run_dir == settings.ROOT / "run" / "lbscaler"


def test_every_setting_has_a_refused_value_here() -> None:
    assert REFUSED.keys() == SETTINGS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in REFUSED.items() for value in values]
)
def test_bad_value_is_one_line_with_its_flag_its_variable_and_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        read({variable(name): value})
    assert str(caught.value) == f"{flag(name)} ({variable(name)}) is {value!r}; allowed: {REFUSED[name][0]}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("project", "a" * 40, "a" * 40),
        ("port", "65535", 65535),
        ("min", "1", 1),
        ("spares", "0", 0),
        ("spares", "100", 100),
        ("target", "0.5", 0.5),
        ("interval", "0.5", 0.5),
        ("drain_timeout", "0", 0),
        ("ready_timeout", "1", 1),
        ("ready_timeout", "3600", 3600),
        ("image", "registry.example:5000/a/b:1.0@sha256:00", "registry.example:5000/a/b:1.0@sha256:00"),
        ("health", "tcp", "tcp"),
        ("health", "http:/healthz?a=b", "http:/healthz?a=b"),
        ("subnet", "10.0.0.0/8", "10.0.0.0/8"),
        ("subnet", "198.18.0.0/28", "198.18.0.0/28"),
        ("metric", "concurrency", "concurrency"),
        ("weights", "equal", "equal"),
        ("sticky", "60", 60),
        ("record", "1", "1"),
        ("ulimit", "nofile=1048576", "nofile=1048576"),
        ("allow", "all", RESTRICTIONS),
        ("allow", "tmp,all", RESTRICTIONS),
        ("attach", "a-db b.net", ("a-db", "b.net")),
        ("add_host", "db:198.18.0.9 host.internal:host-gateway", ("db:198.18.0.9", "host.internal:host-gateway")),
        ("label", "tier=web 'a.b/c=two words'", ("tier=web", "a.b/c=two words")),
    ],
)
def test_good_values_at_the_limits_are_taken(name: str, value: str, expected: object) -> None:
    assert getattr(read({f"LB_{name.upper()}": value}), name) == expected


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"min": "11"}, "--min 11 is above --max 10; raise the one or lower the other"),
        ({"max": "1"}, "--min 2 is above --max 1; raise the one or lower the other"),
        ({"port": "5000"}, "the service and --manager-port both have port 5000; change one of them"),
        ({"project": "q", "attach": "p q"}, "--attach q is the project's own network; leave it out"),
        (
            {"publish": "80:8080 5000:8443"},
            "the service and --manager-port both have port 5000; change one of them",
        ),
        *(
            (
                {"orchestrator": "swarm", **only_docker},
                "--spares, --datapath host and --bind are for --orchestrator docker; leave them out",
            )
            for only_docker in ({"spares": "1"}, {"datapath": "host"}, {"bind": "127.0.0.1"})
        ),
        (
            {"interval": "7"},
            "--interval 7, --panic-window 6 and --stable-window 60 must not decrease in this order",
        ),
        (
            {"stable_window": "5.5"},
            "--interval 2, --panic-window 6 and --stable-window 5.5 must not decrease in this order",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(values: dict[str, str], line: str) -> None:
    with pytest.raises(SettingError) as caught:
        read({variable(name): value for name, value in values.items()})
    assert str(caught.value) == line


def test_published_ports_replace_the_port_of_the_service_and_of_the_backends() -> None:
    settings = read({"LB_PORT": "90", "LB_PUBLISH": "80:8080 443:8443"})
    assert settings.ports == ((80, 8080), (443, 8443))
    assert (settings.port, settings.backend_port) == (80, 8080)
    assert read({"LB_PORT": "90", "LB_BACKEND_PORT": "8080"}).ports == ((90, 8080),)


def test_prefix_of_chains_differs_by_project_and_is_short_enough() -> None:
    assert chain_prefix("a") != chain_prefix("b")
    assert len(chain_prefix("a" * 40)) == 10


def test_variable_overrides_the_running_project_and_that_overrides_the_default(root: Path) -> None:
    place = root / "run" / "p"
    place.mkdir(parents=True)
    running = {"LB_PROJECT": "p", "LB_MAX": "30", "LB_MIN": "3", "backend_image": "x"}
    (place / "settings.json").write_text(json.dumps(running))
    result = with_stored({"LB_PROJECT": "p", "LB_MAX": "20", "HOME": "/"})
    assert [result[f"LB_{name}"] for name in ("MAX", "MIN", "PORT")] == ["20", "3", "8000"]
    assert result.keys() == {variable(name) for name in SETTINGS}
    assert with_stored({"LB_PROJECT": "q"})["LB_MIN"] == "2", "of another project"
    assert stored("p")["backend_image"] == "x"


@pytest.mark.parametrize("text", ["", "no json", "[]", "3"])
def test_file_of_the_running_project_that_cannot_be_read_is_ignored(root: Path, text: str) -> None:
    place = root / "run" / "lbscaler"
    place.mkdir(parents=True)
    (place / "settings.json").write_text(text)
    assert with_stored({})["LB_MAX"] == "10"


def test_settings_need_the_standard_library_alone() -> None:
    command = [sys.executable, "-S", "-I", str(Path(settings.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
