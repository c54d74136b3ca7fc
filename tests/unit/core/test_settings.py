"""Settings: who wins, what is refused, and in which words."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from core import settings
from core.settings import SETTINGS, SettingError, assignments, read

PORT = "1 to 65535"
# name: what is allowed, as told; values that are refused
REFUSED: dict[str, tuple[str, list[str]]] = {
    "project": ("a-z 0-9 _ -, 40 at most", ["", "A", "-x", "a.b", "a b", "../x", "a\nb", "a\n", "a" * 41, "é"]),
    "bind": ("an IPv4 address of this host", ["", "localhost", "1.2.3", "1.2.3.256", "::1", "0.0.0.0/0"]),
    "port": (PORT, ["", "0", "08000", "65536", "-1", "80.5", "http", "0x50", "8_0", " 80", "80\n", "+80", "٨٠"]),
    "manager_port": (PORT, ["0", "65536", "x"]),
    "min": ("1 to 1000", ["", "0", "1001", "2.5", "two", "nan"]),
    "max": ("1 to 1000", ["0", "1001", "-3"]),
    "spares": ("0 to 100", ["", "-1", "101", "1.5", "some"]),
    "metric": ("packets, connections or concurrency", ["", "bytes", "PACKETS", "packets "]),
    "target": ("a number above 0", ["", "0", "-1", "nan", "inf", "1e3", "1_0", " 7", "7\n", "٧", "many"]),
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
    "command": ("words, quoted as in a shell", ["'", 'a "b']),
    "memory": ("a size such as 256m or 2g", ["", "0m", "256", "256MB", "-1m", "1.5g", "m"]),
    "cpus": ("0.01 to 1000", ["0", "0.001", "1001", "one", "-1"]),
    "tmpfs": ("an absolute path", ["run", "/a:size=1", "/a,/b"]),
    "volume": ("HOST-PATH:PATH, :ro or :rw at its end", ["/a", "/a:b", "/a:/b:z", ":/b", "/a:/b:ro:rw"]),
    "allow": (
        "write, root, capabilities, privileges, with commas",
        ["everything", "Root", "write;root", "write,no"],
    ),
    "subnet": (
        "an IPv4 network such as 198.18.0.0/20",
        ["x", "198.18.0.1/20", "0.0.0.0/0", "10.0.0.0/29", "fd00::/64"],
    ),
    "preserve_client_ip": ("1, or nothing", ["0", "yes", " "]),
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


def test_the_defaults_are_those_of_the_contract() -> None:
    assert vars(read({})) == {
        **{"weights": "adaptive", "preserve_client_ip": ""},
        **{"project": "lbscaler", "bind": "0.0.0.0", "port": 8000, "manager_port": 5000, "min": 2, "max": 10},
        **{"spares": 0, "record": ""},
        **{"metric": "packets", "target": 100, "interval": 2, "stable_window": 60, "panic_window": 6},
        **{"drain_timeout": 30, "ready_timeout": 60, "image": "", "backend_port": 8000, "health": "sync", "subnet": ""},
        **{"orchestrator": "docker", "base_image": "debian:trixie-slim"},
        **{"env": (), "command": (), "memory": "256m", "cpus": 0, "tmpfs": (), "volume": (), "allow": frozenset()},
        **{"registry": "", "advertise": "", "constraint": (), "spread": (), "balancer_constraint": (), "locality": ""},
    }
    assert read({}).run_dir == settings.ROOT / "run" / "lbscaler"


def test_every_setting_has_values_that_are_refused() -> None:
    assert REFUSED.keys() == SETTINGS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in REFUSED.items() for value in values]
)
def test_a_bad_value_is_one_line_with_its_flag_its_variable_itself_and_what_is_allowed(name: str, value: str) -> None:
    flag, variable, allowed = f"--{name.replace('_', '-')}", f"LB_{name.upper()}", REFUSED[name][0]
    for arguments, environ in (([], {variable: value}), ([f"{flag}={value}"], {})):
        with pytest.raises(SettingError) as caught:
            assignments(arguments, environ)
        assert str(caught.value) == f"{flag} ({variable}) is {value!r}; allowed: {allowed}"
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
        ("preserve_client_ip", "1", "1"),
        ("record", "1", "1"),
    ],
)
def test_good_values_at_the_limits_are_taken(name: str, value: str, expected: object) -> None:
    assert getattr(read({f"LB_{name.upper()}": value}), name) == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--min", "11"], "--min 11 is above --max 10; raise the one or lower the other"),
        (["--max", "1"], "--min 2 is above --max 1; raise the one or lower the other"),
        (["--port", "5000"], "--port and --manager-port are both 5000; move one of them"),
        *(
            (
                ["--orchestrator", "swarm", *flag],
                "--spares, --preserve-client-ip and --bind are for --orchestrator docker; leave them out",
            )
            for flag in (["--spares", "1"], ["--preserve-client-ip", "1"], ["--bind", "127.0.0.1"])
        ),
        (
            ["--interval", "7"],
            "--interval 7, --panic-window 6 and --stable-window 60 must not shrink in this order",
        ),
        (
            ["--stable-window", "5.5"],
            "--interval 2, --panic-window 6 and --stable-window 5.5 must not shrink in this order",
        ),
        (["1"], "the number of backends is '1'; allowed: 2 (--min) to 10 (--max)"),
        (["11"], "the number of backends is '11'; allowed: 2 (--min) to 10 (--max)"),
        (["two"], "the number of backends is 'two'; allowed: 2 (--min) to 10 (--max)"),
        (["--ma", "3"], "unrecognized arguments: --ma; ./run.sh --help lists the flags"),
        (["--max"], "argument --max: expected one argument; ./run.sh --help lists the flags"),
        (["3", "4"], "unrecognized arguments: 4; ./run.sh --help lists the flags"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(SettingError) as caught:
        assignments(arguments, {})
    assert str(caught.value) == line


def test_a_flag_wins_over_the_environment_that_over_the_running_project_that_over_the_default(root: Path) -> None:
    place = root / "run" / "p"
    place.mkdir(parents=True)
    stored = {"LB_PROJECT": "p", "LB_MAX": "30", "LB_MIN": "3", "LB_TARGET": "7", "backend_image": "x"}
    (place / "settings.json").write_text(json.dumps(stored))
    given = {"LB_PROJECT": "p", "LB_MAX": "20", "LB_MIN": "4", "HOME": "/"}
    result = assignments(["--max", "15"], given)
    assert [result[f"LB_{name}"] for name in ("MAX", "MIN", "TARGET", "PORT")] == ["15", "4", "7", "8000"]
    assert assignments(["--project", "q"], given)["LB_TARGET"] == "100", "of another project"
    assert "HOME" not in result


@pytest.mark.parametrize("text", ["", "no json", "[]", "3"])
def test_a_file_of_the_running_project_that_cannot_be_read_counts_for_nothing(root: Path, text: str) -> None:
    place = root / "run" / "lbscaler"
    place.mkdir(parents=True)
    (place / "settings.json").write_text(text)
    assert assignments([], {})["LB_MAX"] == "10"


def test_what_is_stored_is_what_the_next_run_starts_from(root: Path) -> None:
    text = settings.stored({"LB_MAX": "12", "LB_PROJECT": "p", "PATH": "/bin"}, "an-image", "a-balancer", "the-code")
    values = json.loads(text)
    assert [values[name] for name in ("backend_image", "balancer_image", "manager")] == [
        "an-image",
        "a-balancer",
        "the-code",
    ]
    (root / "run" / "p").mkdir(parents=True)
    settings.store(root / "run" / "p" / "settings.json", text)
    assert (root / "run" / "p" / "settings.json").stat().st_mode & 0o777 == 0o600
    assert assignments(["--project", "p"], {})["LB_MAX"] == "12"
    assert "PATH" not in text


def test_run_sh_gets_every_setting_and_its_own_switches() -> None:
    result = assignments(["3", "--follow", "--no-install", "--no-wait"], {})
    assert result.keys() == {f"LB_{name.upper()}" for name in SETTINGS} | {
        "ACTION",
        "SWARM_INIT",
        "FOLLOW",
        "NO_INSTALL",
        "NO_WAIT",
        "BACKENDS",
    }
    switches = ("BACKENDS", "FOLLOW", "NO_INSTALL", "NO_WAIT")
    assert [result[name] for name in switches] == ["3", "1", "1", "1"]
    plain = assignments([], {})
    assert [plain[name] for name in switches] == [""] * 4


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["settings.py", *arguments])
    for name in [name for name in os.environ if name.startswith("LB_")]:
        monkeypatch.delenv(name)
    return settings.main()


def test_a_bad_setting_is_one_line_on_standard_error_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--min", "0") == 2
    assert capsys.readouterr() == ("", "run.sh: --min (LB_MIN) is '0'; allowed: 1 to 1000\n")


def test_what_is_printed_is_safe_for_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    health = "http:/$(echo>x);'a\"b"
    assert run(monkeypatch, "--health", health) == 0
    words = shlex.split(capsys.readouterr().out)
    assert f"LB_HEALTH={health}" in words
    assert len(words) == len(SETTINGS) + 6


def test_words_are_quoted_anew_so_that_a_shell_finds_nothing_to_carry_out() -> None:
    made = assignments(
        [], {"LB_BALANCER_CONSTRAINT": "node.labels.a==$(touch${IFS}/tmp/x) b==`c`", "LB_ENV": "A=1  B=2"}
    )
    assert made["LB_BALANCER_CONSTRAINT"] == "'node.labels.a==$(touch${IFS}/tmp/x)' 'b==`c`'"
    assert made["LB_ENV"] == "A=1 B=2"


def test_the_text_to_store_is_printed_and_stored_from_standard_input(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--print", "an-image", "a-balancer", "the-code") == 0
    text = capsys.readouterr().out
    assert json.loads(text)["backend_image"] == "an-image"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run(monkeypatch, "--store", str(root / "settings.json")) == 0
    assert (root / "settings.json").read_text() == text


def test_settings_that_cannot_be_stored_are_one_line_and_the_old_file_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "settings.json"
    path.write_text("old")
    path.with_name("settings.json.new").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO("new"))
    assert run(monkeypatch, "--store", str(path)) == 1
    assert capsys.readouterr() == ("", f"run.sh: cannot write {path}: Is a directory\n")
    assert path.read_text() == "old"


def test_settings_that_do_not_fit_on_the_disk_are_one_line_and_the_old_file_stays(root: Path) -> None:
    path = root / "settings.json"
    path.write_text("old")
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    limit += f"sys.argv = ['settings.py', '--store', {str(path)!r}]; "
    limit += f"runpy.run_path({settings.__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", limit]
    done = subprocess.run(command, input="x" * 200, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"run.sh: cannot write {path}: File too large\n")
    assert path.read_text() == "old"


def test_help_lists_every_flag_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in SETTINGS.items():
        default = f" (default: {setting.default})" if setting.default else ""
        assert f"{settings.flag(name)} {name.upper()} {setting.meaning}; {setting.allowed}{default}" in text


def test_it_runs_on_the_standard_library_alone() -> None:
    command = [sys.executable, "-S", "-I", str(Path(settings.__file__)), "--max", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run.sh: --max (LB_MAX) is '0'; allowed: 1 to 1000\n"
