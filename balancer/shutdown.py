"""The end of a project's service: `drain SECONDS` waits for the open connections, `remove` takes all rules and sets out
of the host's namespace. For stop.sh, which has stopped the manager before."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import restore
import ruleset
from datapath import DataPath, from_environment
from listings import connections
from netfilter import Netfilter, NetfilterError, run

POLL = 0.2  # seconds
DRAINING = Path("/run/draining")  # script.sh makes it
DESTROY_TRIES = 25  # with POLL: the kernel may use a set for a moment after its last rule is gone


def drain(netfilter: Netfilter, seconds: float) -> int:
    """Ends dispatch and waits until no connection is open. Returns how many are after `seconds`, or when DRAINING is
    gone: run.sh removes it, because the project serves again."""
    end_dispatch(netfilter)
    backends = connections(netfilter.listing("nat"), netfilter.path.backend_chain(""))
    deadline = time.monotonic() + seconds
    while True:
        live = netfilter.all_flows().live
        still_open = sum(live[ip] for ip in backends)
        if not still_open or time.monotonic() > deadline or not DRAINING.exists():
            return still_open
        time.sleep(POLL)


def end_dispatch(netfilter: Netfilter) -> None:
    """Without dispatch rules a new connection reaches this host itself. There it is refused immediately instead of
    dropped: its client must not wait for a service that is ending."""
    path = netfilter.path
    nat = netfilter.listing("nat")
    entrances = [chain for chain in (path.dispatch, path.chain("STICKY")) if chain in nat.chains]
    netfilter.apply("*nat\n" + "".join(f":{chain} - [0:0]\n" for chain in entrances) + "COMMIT\n")
    # All other rules of the chain stay.
    chain = path.chain("INPUT")
    received = netfilter.listing("filter").chains.get(chain, ())
    kept = [rule for rule in received if rule not in ruleset.undispatched(path)]
    if len(kept) < len(received):
        rules = "".join(f"-A {chain} {rule}\n" for rule in kept)
        netfilter.apply(f"*filter\n:{chain} - [0:0]\n{rules}COMMIT\n")


def remove(netfilter: Netfilter) -> None:
    """Removes the project's rules, connections and sets. Does nothing where there are none."""
    path, sets = netfilter.path, netfilter.set_names()
    nat, filters = netfilter.listing("nat"), netfilter.listing("filter")
    # The set has them also after an earlier removal that failed when the nat table was done.
    ips = netfilter.members(path.traffic_set) if path.traffic_set in sets else {}
    for name, listing in (("nat", nat), ("filter", filters)):
        netfilter.apply(restore.removal(name, listing, path.prefix))
    # Without entries, a connection that is still open gets a reset.
    netfilter.delete_flows(ips)
    for name in sets:
        _destroy(name)


def _destroy(name: str) -> None:
    for tries_left in reversed(range(DESTROY_TRIES)):
        try:
            run(["ipset", "destroy", name])
        except NetfilterError:
            if not tries_left:
                raise
            time.sleep(POLL)
        else:
            return


def main(arguments: list[str], path: DataPath) -> int:
    netfilter = Netfilter(os.environ["IPTABLES"], path)
    try:
        if arguments[0] == "remove":
            remove(netfilter)
            return 0
        still_open = drain(netfilter, float(arguments[1]))
    except NetfilterError as error:
        print(f"shutdown.py: {error}", file=sys.stderr)
        return 1
    if still_open:
        print(f"connections still open after {arguments[1]} s: {still_open}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], from_environment(os.environ)))
