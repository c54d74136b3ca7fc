"""The secrets that run.sh shares with a Swarm's balancers: the shell's functions, with a fake Docker client."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Secrets are files of $STATE, their labels beside them. The only service there may be reads them.
DOCKER = r"""#!/bin/bash
words="$*" name=${*: -1}
case "$words" in
    "secret inspect "*) [ -e "$STATE/$name" ] && cat "$STATE/$name.digest" ;;
    "secret create "*)
        name=${*: -2:1} words=${words#*lbscaler.digest=}
        echo "${words%% *}" >"$STATE/$name.digest"
        cp "${*: -1}" "$STATE/$name" ;;
    "secret ls "*) cd "$STATE" && ls | grep -v 'digest$' ;;
    "secret rm "*)
        for name in "${@:3}"; do rm "$STATE/$name" "$STATE/$name.digest"; done ;;
    "node ls "*) echo this-node ;;
    "node update "*) echo "$words" >>"$STATE.nodes" ;;
    "info "*) echo this-node ;;
    "service create "*)
        echo "$words" >>"$STATE.services"
        touch "$STATE.task" ;;
    "service rm p-secrets") rm "$STATE.task" ;;
    "ps "*) [ ! -e "$STATE.task" ] || echo a-task ;;
    "exec a-task cat /run/secrets/token") cat "$STATE/p-token" ;;
    "exec a-task cat /run/secrets/manager.pem") cat "$STATE/p-manager" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    for name in ("state", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "docker").write_text(DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    return tmp_path / "state"


def share(state: Path, run: Path, after: str = "") -> subprocess.CompletedProcess[str]:
    """share_secrets on a node whose files are in `run`; prints the names of the two secrets."""
    run.mkdir(exist_ok=True)
    make_token = 'make_token() { [ -s "$RUN/token" ] || echo "made in $RUN" >"$RUN/token"; }'
    script = f"""
    set -euo pipefail
    LB_PROJECT=p RUN='{run}' LOG='{run}/log' BALANCER_IMAGE=balancer-image
    export STATE='{state}' PATH='{state.parent / "bin"}':"$PATH"
    . manager/host.sh
    . manager/swarm.sh
    {make_token}
    share_secrets >&2
    echo "$LB_TOKEN_SECRET $LB_CERTIFICATE_SECRET"
    {after}
    """
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def names(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def secrets(state: Path) -> set[str]:
    return {path.name for path in state.iterdir() if path.suffix != ".digest"}


def test_balancers_get_the_certificate_and_never_the_key(state: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    token, certificate = names(share(state, run))
    assert token == "p-token"
    assert (state / token).read_text() == (run / "token").read_text()
    assert (state / certificate).read_text() == (run / "certificate.pem").read_text()
    for name in (token, certificate):
        assert "PRIVATE KEY" not in (state / name).read_text()
    both = (run / "manager.pem").read_text()
    assert ("PRIVATE KEY" in both, "BEGIN CERTIFICATE" in both) == (True, True)
    assert (run / "manager.pem").stat().st_mode & 0o777 == 0o600
    assert names(share(state, run)) == [token, certificate], "again nothing changes"
    assert secrets(state) == {token, certificate, "p-manager"}
    assert not (state.parent / "state.services").exists(), "nothing had to be fetched"


def test_manager_that_moves_goes_on_with_the_same_token_key_and_certificate(state: Path, tmp_path: Path) -> None:
    before = names(share(state, tmp_path / "first"))
    assert names(share(state, tmp_path / "second")) == before, "so that no balancer has to be updated"
    for name in ("token", "manager.pem", "certificate.pem"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()
    for name in ("token", "manager.pem"):
        assert (tmp_path / "second" / name).stat().st_mode & 0o777 == 0o600
    (created,) = (state.parent / "state.services").read_text().splitlines()
    assert "--constraint node.id==this-node" in created
    assert not (state.parent / "state.task").exists(), "the task that had the secrets is gone"


def test_task_with_the_secrets_is_removed_where_they_cannot_be_read(state: Path, tmp_path: Path) -> None:
    names(share(state, tmp_path / "first"))
    (state / "p-token").rename(state / "p-token.digest.gone")
    done = share(state, tmp_path / "second")
    assert done.returncode == 1
    assert "Fetching the project's secrets from the Swarm: failed" in done.stderr
    assert not (state.parent / "state.task").exists()


def test_another_token_than_the_balancers_have_is_refused(state: Path, tmp_path: Path) -> None:
    names(share(state, tmp_path / "first"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "token").write_text("another")
    done = share(state, tmp_path / "second")
    assert done.returncode == 1
    assert "second/token is not the one this Swarm's balancers have" in done.stderr


def test_a_start_that_failed_leaves_neither_secrets_nor_a_claim(state: Path, tmp_path: Path) -> None:
    names(share(state, tmp_path / "first", after="forget_in_swarm"))
    assert secrets(state) == set()
    assert (tmp_path / "state.nodes").read_text() == "node update --label-rm lbscaler.manager.p this-node\n"
