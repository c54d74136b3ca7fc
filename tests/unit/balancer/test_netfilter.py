"""How the tools are run, when they are tried again, and what their errors contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import ctnetlink
import netfilter
from features import MARKS, NOTRACK, OPTIONAL, RETRIES, Feature
from netfilter import Netfilter, NetfilterError

TOOLS = ("iptables-nft-restore", "iptables-nft-save", "iptables-legacy-restore", "ipset", "ip")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between two tries, which take no time here."""
    slept: list[float] = []
    monkeypatch.setattr(netfilter, "time", SimpleNamespace(sleep=slept.append))
    return slept


def tool(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_tool_gets_the_text_and_its_output_is_returned(tmp_path: Path) -> None:
    assert netfilter.run([tool(tmp_path / "tool", 'echo "<$1>"; cat'), "a b; c"], "text\n") == "<a b; c>\ntext\n"


def test_output_that_is_no_utf_8_is_text_all_the_same() -> None:
    """Another program's rule may have such a comment, and the rules have to be written nevertheless."""
    assert netfilter.run(["printf", r"-A FORWARD -m comment --comment \374 -j ACCEPT"]).split(" ")[5] == "\ufffd"


def test_tool_that_does_not_exist_is_named() -> None:
    with pytest.raises(NetfilterError, match=r"no-such-tool cannot be run: .*No such file"):
        netfilter.run(["no-such-tool", "-L"])


@pytest.mark.parametrize("content", [None, "many\n"], ids=["missing", "no number"])
def test_setting_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    monkeypatch.setattr(netfilter, "PROC", tmp_path)
    if content is not None:
        (tmp_path / "ipv4").mkdir()
        (tmp_path / "ipv4" / "ip_forward").write_text(content)
    with pytest.raises(NetfilterError, match="ipv4/ip_forward cannot be read: "):
        Netfilter("nft").ip_forward()


@pytest.mark.parametrize(
    ("codes", "runs", "succeeds"),
    [
        ([0], 1, True),
        ([1, 0], 1, False),
        ([4, 4, 0], 3, True),
        ([4, 1, 0], 2, False),
        ([4] * 9, netfilter.TRIES, False),
    ],
)
def test_only_a_held_lock_is_tried_again(
    tmp_path: Path, pauses: list[float], codes: list[int], runs: int, succeeds: bool
) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script = tool(tmp_path / "tool", f'cd {tmp_path}; echo >>log; exit "$(sed -n "$(wc -l <log)p" codes)"')
    try:
        netfilter.run([script])
    except NetfilterError:
        assert not succeeds
    else:
        assert succeeds
    assert len((tmp_path / "log").read_text().splitlines()) == runs
    assert pauses == [0.1, 0.2, 0.4, 0.8][: runs - 1]


def test_error_contains_the_command_its_output_and_the_numbered_text(tmp_path: Path) -> None:
    script = tool(tmp_path / "tool", "echo line 2 failed >&2; exit 3")
    with pytest.raises(NetfilterError) as caught:
        netfilter.run([script, "--noflush"], "*nat\n-A X -j Y\nCOMMIT\n")
    assert str(caught.value) == (
        f"{script} --noflush: exit code 3: line 2 failed\n    1 *nat\n    2 -A X -j Y\n    3 COMMIT"
    )


@pytest.mark.parametrize(
    ("flavour", "call", "log"),
    [
        ("nft", lambda n: n.table("nat"), "iptables-nft-save -c -t nat <\n"),
        ("nft", lambda n: n.apply("*nat\nCOMMIT\n"), "iptables-nft-restore --noflush -w 5 <*nat COMMIT\n"),
        ("legacy", lambda n: n.apply("*nat\n"), "iptables-legacy-restore --noflush -w 5 <*nat\n"),
        ("nft", lambda n: n.apply(""), ""),
        (
            "nft",
            lambda n: n.make_sets(),
            "ipset create LB-BACKENDS hash:ip family inet counters -exist <\n"
            "ipset create LB-REPLIES hash:ip family inet counters -exist <\n",
        ),
        ("nft", lambda n: n.members("LB-BACKENDS"), "ipset save LB-BACKENDS <\n"),
        ("nft", lambda n: n.change_sets("add LB-BACKENDS 1\n"), "ipset restore -exist <add LB-BACKENDS 1\n"),
        ("nft", lambda n: n.change_sets(""), ""),
        ("nft", lambda n: n.delete_flows([]), ""),
        (
            "nft",
            lambda n: n.delete_neighbours(["198.18.0.2", "198.18.0.3"]),
            "ip -batch - <neigh flush to 198.18.0.2 neigh flush to 198.18.0.3\n",
        ),
    ],
)
def test_each_call_runs_its_tool_with_the_right_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, call: Callable[[Netfilter], object], log: str
) -> None:
    for name in TOOLS:
        tool(tmp_path / name, f'echo "$(basename "$0") $* <$(paste -sd " ")" >>{tmp_path}/log')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "log").touch()
    call(Netfilter(flavour))
    assert (tmp_path / "log").read_text() == log


@pytest.mark.parametrize(
    ("refused", "missing"),
    [
        ("nothing", ()),
        ("CONNMARK", (MARKS,)),
        ("connbytes", (RETRIES,)),
        ("notrack", (NOTRACK,)),
        ("LB-TRY", OPTIONAL),
    ],
)
def test_missing_features_are_found_by_trying_their_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, missing: tuple[Feature, ...]
) -> None:
    tool(tmp_path / "iptables-nft-restore", f"! grep -q -e {refused}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Netfilter("nft").missing(OPTIONAL) == missing


@pytest.mark.parametrize("error", [TimeoutError("not finished after 30 s"), PermissionError(1, "no")])
@pytest.mark.parametrize(
    "call",
    [
        lambda n: n.all_flows(),
        lambda n: n.waiting_flows(),
        lambda n: n.flows_of(["198.18.0.2"]),
        lambda n: n.delete_flows(["198.18.0.2"]),
        lambda n: n.delete_misdirected_flows(["198.18.0.2"]),
    ],
    ids=["all", "waiting", "of one", "delete", "delete misdirected"],
)
def test_errors_of_the_connection_table_are_errors_of_netfilter(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Netfilter], object], error: Exception
) -> None:
    def refuse(request: bytes) -> Iterator[bytes]:
        raise error

    monkeypatch.setattr(ctnetlink, "listing", refuse)
    monkeypatch.setattr(ctnetlink, "delete", list)
    with pytest.raises(NetfilterError, match="connection table: "):
        call(Netfilter("nft"))
