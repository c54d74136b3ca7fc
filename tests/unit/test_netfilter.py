"""The tools are run as asked, tried again only for a lock, and fail with words one can act on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import netfilter
from netfilter import Netfilter, NetfilterError

TOOLS = ("iptables-nft-restore", "iptables-nft-save", "iptables-legacy-restore", "ipset", "conntrack", "ip")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps between two tries, none of which is slept."""
    slept: list[float] = []
    monkeypatch.setattr(netfilter, "time", SimpleNamespace(sleep=slept.append))
    return slept


def tool(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def tries(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_the_tool_is_fed_the_text_and_its_output_comes_back(tmp_path: Path) -> None:
    assert netfilter.run([tool(tmp_path / "tool", 'echo "<$1>"; cat'), "a b; c"], "text\n") == "<a b; c>\ntext\n"


@pytest.mark.parametrize(
    ("codes", "accept", "ran", "fine"),
    [
        ([0], (0,), 1, True),
        ([1], (0, 1), 1, True),
        ([1, 0], (0,), 1, False),
        ([2, 0], (0, 1), 1, False),
        ([4, 4, 0], (0,), 3, True),
        ([4, 1, 0], (0,), 2, False),
        ([4] * 9, (0,), netfilter.TRIES, False),
    ],
)
def test_only_a_held_lock_is_tried_again(
    tmp_path: Path, naps: list[float], codes: list[int], accept: tuple[int, ...], ran: int, fine: bool
) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script = tool(tmp_path / "tool", f'cd {tmp_path}; echo >>log; exit "$(sed -n "$(wc -l <log)p" codes)"')
    try:
        netfilter.run([script], accept=accept)
    except NetfilterError:
        assert not fine
    else:
        assert fine
    assert tries(tmp_path / "log") == ran
    assert naps[: ran - 1] == [0.1, 0.2, 0.4, 0.8][: ran - 1]


def test_the_wait_for_a_lock_comes_between_two_tries_and_not_after_the_last(tmp_path: Path, naps: list[float]) -> None:
    with pytest.raises(NetfilterError):
        netfilter.run([tool(tmp_path / "tool", "exit 4")])
    assert len(naps) == netfilter.TRIES - 1


def test_an_error_carries_the_command_its_words_and_the_numbered_text(tmp_path: Path) -> None:
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
            lambda n: n.members(),
            "ipset create LB-BACKENDS hash:ip family inet counters -exist <\nipset save LB-BACKENDS <\n",
        ),
        ("nft", lambda n: n.change_members("add LB-BACKENDS 1\n"), "ipset restore -exist <add LB-BACKENDS 1\n"),
        ("nft", lambda n: n.change_members(""), ""),
        ("nft", lambda n: n.flows(), "conntrack -L -p tcp --dst-nat <\n"),
        ("nft", lambda n: n.forget_flows("198.18.0.2"), "conntrack -D -p tcp --reply-src 198.18.0.2 <\n"),
        (
            "nft",
            lambda n: n.forget_flows("198.18.0.2", unanswered_only=True),
            "conntrack -D -p tcp --state SYN_SENT --reply-src 198.18.0.2 <\n",
        ),
        (
            "nft",
            lambda n: n.forget_neighbours(["198.18.0.2", "198.18.0.3"]),
            "ip -batch - <neigh flush to 198.18.0.2 neigh flush to 198.18.0.3\n",
        ),
    ],
)
def test_each_call_runs_its_tool_with_arguments_the_tool_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, call: Callable[[Netfilter], object], log: str
) -> None:
    for name in TOOLS:
        tool(tmp_path / name, f'echo "$(basename "$0") $* <$(paste -sd " ")" >>{tmp_path}/log')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "log").touch()
    call(Netfilter(flavour))
    assert (tmp_path / "log").read_text() == log


@pytest.mark.parametrize("call", [lambda n: n.flows(), lambda n: n.forget_flows("198.18.0.2")])
def test_no_flow_at_all_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Netfilter], object]
) -> None:
    tool(tmp_path / "conntrack", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    call(Netfilter("nft"))
