"""The shell that run.sh, stop.sh and the tests share, tried for itself."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def shell(script: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    text = f"set -euo pipefail\nLOG={tmp_path}/log; RUN={tmp_path}; : >$LOG\n. '{ROOT}/manager/host.sh'\n{script}"
    # What starts the tests in the background may have SIGINT ignored, and no shell can trap what it was to ignore.
    command = ["env", "--default-signal=INT,TERM,HUP", "bash", "-c", text]
    environment = {**os.environ, "LB_PROJECT": "p", **variables}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=20, check=False
    )


def test_a_step_is_said_and_timed_and_its_words_go_to_the_log(tmp_path: Path) -> None:
    done = shell("step 'Doing it' echo many words", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Doing it … ")
    assert done.stdout.endswith(" s\n")
    assert (tmp_path / "log").read_text() == "many words\n"


def test_a_step_that_fails_shows_the_end_of_its_log_and_where_the_whole_is(tmp_path: Path) -> None:
    done = shell("step 'Doing it' bash -c 'seq 100; exit 3'; echo never", tmp_path)
    assert done.returncode == 1
    assert done.stdout == "Doing it … failed\n"
    assert done.stderr.splitlines()[1:16] == [str(n) for n in range(86, 101)]
    assert f"{tmp_path}/log" in done.stderr
    assert "Doing it: failed with status 3" in done.stderr


@pytest.mark.parametrize(
    ("script", "times"),
    [
        ("step 'Doing it' sh -c \"kill -INT $$\"; sleep 20", 60),  # it ends; one in some twenty hung
        ("f() { sleep 20; sleep 20; }; kill -INT $$ & step 'Doing it' f", 10),  # it begins
    ],
)
def test_an_interrupt_that_comes_as_a_step_ends_or_begins_ends_it_too(tmp_path: Path, script: str, times: int) -> None:
    traps = "trap 's=$?; end_step; exit $s' EXIT; trap 'exit 130' INT"
    for _ in range(times):
        assert shell(f"{traps}; {script}", tmp_path).returncode == 130


def test_what_may_not_be_installed_is_named(tmp_path: Path) -> None:
    done = shell("need 'running containers' docker.io iptables; echo never", tmp_path, NO_INSTALL="1")
    line = "missing for running containers: docker.io iptables; install it, or leave --no-install out"
    assert (done.returncode, done.stdout) == (1, "")
    assert line in done.stderr


def test_an_engine_elsewhere_is_refused(tmp_path: Path) -> None:
    done = shell("ensure_engine; echo never", tmp_path, DOCKER_HOST="tcp://example:2375")
    assert (done.returncode, done.stdout) == (1, "")
    assert "DOCKER_HOST is tcp://example:2375; the engine has to be on this host" in done.stderr


@pytest.mark.parametrize(("word", "status"), [("sleep", 0), ("script.py", 1)])
def test_a_reused_process_number_is_not_taken_for_ours(tmp_path: Path, word: str, status: int) -> None:
    begun = "sleep 5 & until grep -q sleep /proc/$!/comm; do :; done"
    asked = f"{begun}; is_process $! {word} && s=0 || s=1; kill $!; exit $s"
    assert shell(asked, tmp_path).returncode == status


@pytest.mark.parametrize("pid", ["", "999999999"])
def test_no_process_is_no_process(tmp_path: Path, pid: str) -> None:
    assert shell(f"is_process '{pid}' sleep", tmp_path).returncode == 1


SLEEPER = "#!/bin/bash\nsleep 60 & trap 'kill $!' EXIT; trap 'exit 0' TERM; wait\n"
BEGIN = """
begin() { bash "$@" & until [ "$(tr '\\0' ' ' </proc/$!/cmdline | cut -d' ' -f1,2)" = "bash $1" ]; do :; done; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A place whose manager and supervisor sleep."""
    place = tmp_path / "checkout"
    (place / "manager").mkdir(parents=True)
    for name in ("script.py", "supervise.sh"):
        (place / "manager" / name).write_text(SLEEPER)
    return place


def test_the_manager_ends_after_its_supervisor_and_only_they(checkout: Path) -> None:
    script = f"""{BEGIN}
    begin manager/supervise.sh --project p
    begin $PWD/manager/script.py --project p --backends 3
    begin manager/script.py --project q; others=$!
    begin manager/script.py --verbose --project p; others+=" $!"
    (cd ..; exec bash checkout/manager/script.py --project q) & others+=" $!"
    echo $others | tr ' ' '\n' >$RUN/manager.pid
    supervisor_runs && manager_runs && end_manager
    ! supervisor_runs && ! manager_runs && kill -0 $others && kill $others
    """
    assert shell(script, checkout).returncode == 0
    assert shell("end_manager", checkout).returncode == 0, "twice is fine"


def test_a_manager_of_another_checkout_is_not_ours(checkout: Path) -> None:
    begin = f"{BEGIN} cd '{checkout}'; begin $PWD/manager/script.py --project p; cd -; "
    script = begin + "s=0; manager_runs || s=1; kill $!; exit $s"
    assert shell(script, checkout).returncode == 0
    assert shell(script, checkout.parent).returncode == 1


@pytest.mark.parametrize(("noted", "status"), [("$!", 0), ("999999999", 1)])
def test_a_manager_from_before_an_upgrade_is_known_by_its_pid_file(checkout: Path, noted: str, status: int) -> None:
    script = f"{BEGIN} begin manager/script.py; echo {noted} >$RUN/manager.pid; s=0; manager_runs || s=1; kill $!"
    assert shell(f"{script}; exit $s", checkout).returncode == status


def test_a_shielded_command_runs_to_its_end_whatever_signals_come(tmp_path: Path) -> None:
    script = """
    trap : INT TERM HUP
    long() { sleep 1; echo done >$RUN/done; return 7; }
    (sleep 0.3; kill -INT $$; kill -TERM $$; kill -HUP $$) &
    shielded long && s=0 || s=$?
    exit $s
    """
    assert shell(script, tmp_path).returncode == 7
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("command", ["true", "exit 3", "kill -KILL $BASHPID"])
def test_a_shielded_command_has_its_own_status(tmp_path: Path, command: str) -> None:
    script = f"f() {{ {command}; }}; shielded f && s=0 || s=$?; exit $s"
    assert shell(script, tmp_path).returncode == {"true": 0, "exit 3": 3}.get(command, 137)


def test_the_digest_covers_the_requirements_but_not_what_is_written_at_run_time(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "requirements.txt").write_text("a==1\n")
    command = 'digest "$RUN/folder"'
    before = shell(command, tmp_path, LB_BASE_IMAGE="x").stdout
    for name in ("ip.txt", "hostip.txt"):
        (folder / name).write_text("198.18.0.2\n")
    assert shell(command, tmp_path, LB_BASE_IMAGE="x").stdout == before
    (folder / "requirements.txt").write_text("a==2\n")
    assert shell(command, tmp_path, LB_BASE_IMAGE="x").stdout != before


def test_get_tells_a_200_from_the_rest(tmp_path: Path) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good" else 503)
            self.end_headers()
            self.wfile.write(b"the body\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        good, bad = (shell(f"http_get 127.0.0.1 {port} {path}", tmp_path) for path in ("/good", "/bad"))
        server.shutdown()
    assert (good.returncode, good.stdout) == (0, "the body\n")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert shell(f"http_get 127.0.0.1 {port} /good", tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--colour"], "stop.sh: unknown word '--colour'; see ./stop.sh --help"),
        (["--project", "A b"], "stop.sh: --project is 'A b'; allowed: a-z 0-9 _ -, 40 at most"),
    ],
)
def test_stop_refuses_what_it_does_not_know_and_touches_nothing(arguments: list[str], line: str) -> None:
    done = subprocess.run([str(ROOT / "stop.sh"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
