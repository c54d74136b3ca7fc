"""Runs a campaign of faults, or writes the page about stored results. See run.sh for its flags."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from chaos import report, soak
from chaos.campaign import RESULTS, Campaign, say
from chaos.fault import PATHS, SWARM
from chaos.site import SiteError
from chaos.swarm_campaign import SwarmCampaign


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/chaos/run.sh", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="default: 3, with --swarm 20")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--datapath", choices=PATHS, default="bridge")
    kind.add_argument("--swarm", dest="datapath", action="store_const", const=SWARM, help="three nodes")
    parser.add_argument("--soak", choices=soak.LOADS, default="", help="a load without faults, steady or in waves")
    parser.add_argument("--faults", default="", help="names, separated by semicolons; default: all")
    parser.add_argument("--json", default="", help="file of the result")
    parser.add_argument("--report", nargs="+", default=[], help="stored results: writes docs/resilience.md from them")
    parser.add_argument("--balancer-image", default="")
    parser.add_argument("--server-image", default="")
    options = parser.parse_args(arguments)
    in_swarm = options.datapath == SWARM
    if in_swarm and options.soak:
        parser.error("--soak is for one host")
    options.minutes = options.minutes or (20.0 if in_swarm else 3.0)
    return options


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the site is removed
    options = parse(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.report:
        report.write([json.loads(Path(name).read_text()) for name in options.report])
        return 0
    with tempfile.TemporaryDirectory(prefix="lbchaos", ignore_cleanup_errors=True) as place:
        try:
            kind = SwarmCampaign if options.datapath == SWARM else Campaign
            result = kind(options, Path(place)).run()
        except (SiteError, AssertionError) as error:  # a program of the site's or the cluster's failed
            print(f"tests/chaos/run.sh: {error}", file=sys.stderr)
            return 1
    file = Path(options.json) if options.json else RESULTS / f"{options.datapath}-{options.seed}.json"
    file.write_text(json.dumps(result, indent=1, default=sorted))  # sets as lists
    say(report.summary(result))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
