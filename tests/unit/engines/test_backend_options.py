"""The options of a backend's container (least privilege, which the settings can lift), and hints after a failure."""

from __future__ import annotations

import docker
import pytest

from engines.docker_engine import DockerEngine
from engines.failure_hints import failure_hint
from engines.options import BalancerOptions, backend_options, secret_mounts
from fakes import settings

OWN = "mode=1777,uid=10001,gid=10001"
STRICT = {
    "command": None,
    "environment": [],
    "user": "10001:10001",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "read_only": True,
    "tmpfs": {"/tmp": OWN},
    "volumes": [],
    "mem_limit": "256m",
    "nano_cpus": None,
    "pids_limit": 128,
    "ulimits": [],
    "extra_hosts": [],
    "labels": {},
    "env_file": [],
    "attach": [],
}
ROOTS = ("", "root", "0", "0:0", "root:adm")


def test_options_without_settings_are_least_privilege() -> None:
    assert backend_options(settings(), "") == STRICT


@pytest.mark.parametrize(
    ("rule", "lifted"),
    [
        ("write", {"read_only": False}),
        ("root", {"user": None, "tmpfs": {"/tmp": "mode=1777"}}),
        ("capabilities", {"cap_drop": None}),
        ("privileges", {"security_opt": None}),
        ("processes", {"pids_limit": -1}),
        ("tmp", {"tmpfs": {}}),
        ("write,root", {"read_only": False, "user": None, "tmpfs": {"/tmp": "mode=1777"}}),
    ],
)
def test_allow_lifts_the_rule_that_it_names_and_no_other(rule: str, lifted: dict[str, object]) -> None:
    assert backend_options(settings(allow=rule), "root") == STRICT | lifted


def test_allow_all_lifts_every_rule() -> None:
    lifted = {"read_only": False, "user": None, "cap_drop": None, "security_opt": None, "pids_limit": -1, "tmpfs": {}}
    assert backend_options(settings(allow="all"), "root") == STRICT | lifted


@pytest.mark.parametrize("user", [*ROOTS, "www-data", "999", "1000:0"])
def test_only_an_image_that_would_run_as_root_gets_the_unprivileged_user(user: str) -> None:
    assert backend_options(settings(), user)["user"] == ("10001:10001" if user in ROOTS else None)


def test_lists_in_settings_are_split_as_in_a_shell() -> None:
    made = backend_options(
        settings(
            env="A=1 'B=two words' C=",
            command="serve --greeting 'hello you'",
            tmpfs="/run /var/cache",
            volume="/srv/a:/a /srv/b:/b:rw named:/c:ro",
            cpus="0.25",
            memory="1g",
        ),
        "",
    )
    assert made == STRICT | {
        "environment": ["A=1", "B=two words", "C="],
        "command": ["serve", "--greeting", "hello you"],
        "tmpfs": dict.fromkeys(("/tmp", "/run", "/var/cache"), OWN),
        "volumes": ["/srv/a:/a:ro", "/srv/b:/b:rw", "named:/c:ro"],
        "nano_cpus": 250_000_000,
        "mem_limit": "1g",
    }


def test_options_of_an_application_with_neighbours() -> None:
    made = backend_options(
        settings(
            attach="db cache",
            env_file="/etc/a.env",
            add_host="db:198.18.0.9",
            label="tier=web 'note=a=b c'",
            ulimit="nofile=1024",
        ),
        "",
    )
    assert made == STRICT | {
        "attach": ["db", "cache"],
        "env_file": ["/etc/a.env"],
        "extra_hosts": ["db:198.18.0.9"],
        "labels": {"tier": "web", "note": "a=b c"},
        "ulimits": [{"Name": "nofile", "Soft": 1024, "Hard": 1024}],
    }


def test_secrets_are_mounted_read_only() -> None:
    assert secret_mounts(settings(secret="key=/c/1 'b.pem=/a dir/2'")) == [
        "/c/1:/run/secrets/key:ro",
        "/a dir/2:/run/secrets/b.pem:ro",
    ]


NGINX_STARTS = """\
/docker-entrypoint.sh: Configuration complete; ready for start up
2026/11/24 10:00:00 [notice] 1#1: nginx/1.26.3
10-listen-on-ipv6-by-default.sh: info: can not modify /etc/nginx/conf.d/default.conf (read-only file system?)
2026/11/24 10:00:00 [alert] 1#1: setrlimit(RLIMIT_NOFILE, 65536) failed (1: Operation not permitted)
"""
NGINX_REFUSED = """\
2026/11/24 10:00:09 [error] 7#7: *1 connect() failed (111: Connection refused) while connecting to upstream
"""
NODE = """\
node:fs:1372
Error: EACCES: permission denied, mkdir '/data'
    at Object.mkdirSync (node:fs:1372:26)
    at handleErrorFromBinding (node:internal:1) {
  code: 'EACCES',
}

Node.js v20.19.2
"""


@pytest.mark.parametrize(
    ("log_lines", "flag"),
    [
        ('open() "/run/nginx.pid" failed (30: Read-only file system)', "--tmpfs PATH, or --allow write"),
        (f'{NGINX_STARTS}nginx: [emerg] mkdir() "/var/lib/nginx/body" failed (30: Read-only file system)', "--tmpfs"),
        (f'{NGINX_STARTS}nginx: [emerg] chown("/x", 33) failed (1: Operation not permitted)', "then --allow capabil"),
        ("OSError: [Errno 30] Read-only file system: '/srv/x'", "--allow write"),
        ('open() "/var/log/nginx/error.log" failed (13: Permission denied)', "--allow root"),
        ("chown: changing ownership of 'x': Operation not permitted", "--allow root"),
        ("This program must be root.", "--allow root"),
        (NODE, "--allow root"),
        ("accept4: Too many open files", "--ulimit nofile=NUMBER"),
        ("sh: 0: Cannot fork: Resource temporarily unavailable", "--allow processes"),
        ("# Warning: could not bind *:80: Permission denied\n# Failed listening on port 80, aborting.", "--allow root"),
    ],
)
def test_last_error_of_a_failed_container_leads_to_the_flag_that_may_help(log_lines: str, flag: str) -> None:
    assert flag in failure_hint(log_lines, 1)


@pytest.mark.parametrize(
    "log_lines",
    [
        "no such luck",
        NGINX_STARTS,
        NGINX_STARTS + NGINX_REFUSED,
        f'{NGINX_STARTS}nginx: [emerg] host not found in upstream "app" in /etc/nginx/conf.d/default.conf:3',
        "open() failed (13: Permission denied)\nnginx: [emerg] bind() to 0.0.0.0:80 failed (98: Address in use)",
    ],
)
def test_harmless_lines_and_errors_before_the_last_one_give_no_hint(log_lines: str) -> None:
    assert failure_hint(log_lines, 1) == ""


@pytest.mark.parametrize("exit_code", [None, 0, 137, 143])
def test_container_that_runs_or_was_stopped_gets_no_hint(exit_code: int | None) -> None:
    assert failure_hint("Permission denied", exit_code) == ""


def test_out_of_memory_kill_decides_the_hint() -> None:
    assert "--memory" in failure_hint("Permission denied", 137, out_of_memory=True)


class Containers:
    """The part of Docker's SDK that `last_log_line` uses: one container in `state`, with `lines` in its log."""

    def __init__(self, state: dict[str, object], lines: str) -> None:
        self.attrs, self._lines = {"State": state}, lines
        self.containers = self

    def get(self, _id: str) -> Containers:
        return self

    def logs(self, tail: int) -> bytes:
        return self._lines.encode()


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ({"Running": True, "ExitCode": 0, "OOMKilled": False}, ""),
        ({"Running": False, "ExitCode": 1, "OOMKilled": False}, " [it may need its image's own user"),
        ({"Running": False, "ExitCode": 137, "OOMKilled": True}, " [the kernel killed it for its memory"),
    ],
)
def test_hint_in_the_last_log_line_depends_on_how_the_container_ended(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, object], hint: str
) -> None:
    sdk = Containers(state, "starting\nopen() failed (13: Permission denied)\n")
    monkeypatch.setattr(docker, "from_env", lambda **_: sdk)
    engine = DockerEngine(settings(), BalancerOptions("balancer-image"))
    line = engine.last_log_line("an-id")
    assert line.startswith("open() failed (13: Permission denied)" + hint)
    assert bool(hint) == line.endswith("]")
