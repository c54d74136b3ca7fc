"""balancer/script.sh: its first rules are those of ruleset.py, and its drain waits for the last flow."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from fakes_netfilter import flow

import ruleset
from ruleset import Endpoint, Listing

SCRIPT = Path(__file__).parents[2] / "balancer" / "script.sh"


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{os.environ['PATH']}"
    command = ["bash", str(folder / "script.sh"), *words]
    environment = {"PATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=environment)


def tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The script in a folder of its own, which also takes the place of the container's /run."""
    (tmp_path / "script.sh").write_text(SCRIPT.read_text().replace("/run/", f"{tmp_path}/"))
    return tmp_path


def rounded(text: str) -> str:
    return re.sub(r"(?<=--probability )\S+", lambda match: f"{float(match[0]):.8f}", text)


@pytest.mark.parametrize(("port", "inside"), [(8000, ""), (9090, "198.18.0.0/24")])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_the_first_rules_are_the_ones_the_client_would_write(folder: Path, count: int, port: int, inside: str) -> None:
    addresses = [f"198.18.0.{number}" for number in range(2, 2 + count)]
    (folder / "ip.txt").write_text("".join(f"{ip}\n" for ip in addresses))
    done = run(folder, "rules", LB_BACKEND_PORT=str(port), LB_INSIDE=inside)
    wanted = ruleset.restore(ruleset.nat([Endpoint(ip, port) for ip in addresses], inside=inside), Listing())
    assert (done.returncode, done.stderr) == (0, "")
    assert rounded(done.stdout) == rounded(wanted)


def test_blank_lines_and_a_missing_last_newline_in_the_list_do_no_harm(folder: Path) -> None:
    (folder / "ip.txt").write_text("198.18.0.2\n\n  198.18.0.3")
    wanted = ruleset.restore(ruleset.nat([Endpoint("198.18.0.2", 8000), Endpoint("198.18.0.3", 8000)]), Listing())
    assert rounded(run(folder, "rules").stdout) == rounded(wanted)


def test_a_word_it_does_not_know_is_refused_with_those_it_does(folder: Path) -> None:
    done = run(folder, "dance")
    assert (done.returncode, done.stdout) == (2, "")
    assert "serve, rules, check, alive or drain" in done.stderr


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ([], ""),
        (["TIME_WAIT", "CLOSE", "LAST_ACK"] * 500, ""),
        (["TIME_WAIT", "ESTABLISHED"], "connections still open after 1 s: 1\n"),
        (["ESTABLISHED"] * 2000, "connections still open after 1 s: 2000\n"),
    ],
    ids=["none", "only ended ones", "one", "a long list of live ones"],
)
def test_drain_deals_nobody_and_waits_for_live_flows_however_many(folder: Path, states: list[str], says: str) -> None:
    (folder / "flavour").write_text("nft\n")
    (folder / "flows").write_text("".join(flow("198.18.0.2", state) for state in states))
    tool(folder, "iptables-nft", f"echo $* >>{folder}/iptables.log")
    tool(folder, "conntrack", f"exec cat {folder}/flows")
    tool(folder, "sleep", f"echo $* >>{folder}/sleep.log")
    done = run(folder, "drain", "1")
    assert (done.returncode, done.stdout) == (0, says)
    assert "-w 5 -t nat -F LB-DISPATCH" in (folder / "iptables.log").read_text().splitlines()
    assert (folder / "draining").exists()
    assert (folder / "sleep.log").exists() == bool(says)


@pytest.mark.parametrize(
    ("nft_lacks", "legacy_lacks", "status", "says"),
    [
        ("nothing", "all", 0, "iptables-nft has all that is needed\n"),
        (
            "connbytes",
            "nothing",
            0,
            "missing in iptables-nft: connbytes: a refused connection is not tried elsewhere\n"
            "iptables-legacy has all that is needed\n",
        ),
        (
            "statistic",
            "to-destination",
            1,
            "missing in iptables-nft: statistic: nothing is balanced\n"
            "missing in iptables-legacy: DNAT: no connection reaches a backend\n",
        ),
    ],
)
def test_check_names_what_the_kernel_lacks_and_what_is_lost_by_it(
    folder: Path, nft_lacks: str, legacy_lacks: str, status: int, says: str
) -> None:
    for flavour, lacks in (("nft", nft_lacks), ("legacy", legacy_lacks)):
        tool(folder, f"iptables-{flavour}-restore", f"! grep -q -e '{lacks}'")
    tool(folder, "ipset", "exit 0")
    done = run(folder, "check")
    assert (done.returncode, done.stdout) == (status, says)


def test_check_misses_the_set_where_there_is_none(folder: Path) -> None:
    tool(folder, "iptables-nft-restore", "cat >/dev/null")
    tool(folder, "ipset", "exit 1")
    assert run(folder, "check").stdout.startswith("missing: ipset: packets and bytes are not counted\n")
