"""A seeded campaign of faults on a live system under load, on a host of its own. See run.sh for its flags."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos import invariants, report, soak
from chaos.machine import describe
from chaos.observe import foreign
from chaos.plan import Round, plan
from chaos.product import Load, Product
from chaos.rounds import QUIET, Scene, carry_out, shares
from chaos.site import Site, SiteError, wait_for
from chaos.table import of_path
from chaos.verdict import Done, Verdict, judge, requests_of, title
from checkout import ROOT

IMAGE = "lbchaos-backend"
WARM_UP = 8.0  # seconds of load before the first fault: past the slow start
RESULTS = ROOT / "run" / "chaos"


def say(text: str) -> None:
    print(text, flush=True)


def build_backend(site: Site, base: str) -> None:
    folder = Path(__file__).with_name("image")
    site.docker("build", "-q", "-t", IMAGE, "--build-arg", f"BASE={base}", str(folder))


def add_others(site: Site, image: str) -> None:
    """A container, a network, rules and a set of others, which have to stay as they are."""
    site.docker("network", "create", "--subnet", "198.19.240.0/24", "others")
    site.docker(
        "run", "-d", "--restart", "always", "--name", "bystander", "--network", "others", "-p", "8081:8000", image
    )
    site.run("iptables", "-N", "FOREIGN")
    site.run("iptables", "-A", "FOREIGN", "-s", "198.18.255.0/24", "-j", "ACCEPT")
    site.run("iptables", "-A", "FORWARD", "-j", "FOREIGN")
    site.run("ipset", "create", "foreign", "hash:ip")
    site.run("ipset", "add", "foreign", "198.18.255.1")


class Campaign:
    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.site = options, Site(place)
        flags = soak.FOLLOWING if options.soak == soak.WAVE else ()
        self.product = Product(self.site, options.datapath, IMAGE, *flags)
        every = of_path(options.datapath)
        chosen = options.faults.split(";") if options.faults else [fault.name for fault in every]
        self.faults = {fault.name: fault for fault in every if fault.name in chosen}
        self.plan: list[Round] = plan(options.seed, options.minutes, list(self.faults.values()))

    def run(self) -> dict[str, Any]:
        options = self.options
        try:
            say("Making a host with an engine of its own")
            self.site.open([options.balancer_image, options.server_image])
            build_backend(self.site, options.server_image)
            add_others(self.site, IMAGE)
            before = foreign(self.site)
            say(f"Starting the system, data path {options.datapath}")
            self.product.up()
            verdict, rounds = self._under_load(before)
            self._store_logs()
            say("Stopping the system")
            self.product.down()
            changed = invariants.changed_foreign(before, foreign(self.site))
            verdict.violations += [f"after stop.sh: {sentence}" for sentence in changed]
            return self._result(verdict, rounds)
        finally:
            self._keep_logs()
            self.site.close()

    def _under_load(self, before: list[str]) -> tuple[Verdict, list[Done]]:
        options = self.options
        scene = Scene(self.site, self.product, before)
        wave = options.minutes * 60 / soak.WAVES if options.soak == soak.WAVE else 0
        load = Load(self.site, "--wave", str(wave))
        try:
            time.sleep(WARM_UP)
            wait_for(lambda: self._complete(scene), "the system is complete", 60)
            watched = soak.watch(scene, options.minutes * 60) if options.soak else []
            rounds = [] if options.soak else [self._round(scene, wanted, load) for wanted in self.plan]
            requests = requests_of(load.stop())
        finally:
            load.kill()
        verdict = judge(requests, rounds, self.faults)
        if options.soak:
            verdict.violations += soak.judge(watched, requests, options.soak)
            verdict.backends = soak.most_and_least(watched)
        samples = [(seen.at, process) for seen in scene.seen for process in seen.processes]
        verdict.violations += invariants.growth(samples)
        return verdict, rounds

    @staticmethod
    def _complete(scene: Scene) -> bool:
        seen = scene.complete()
        return not invariants.unsettled(seen, seen.status.get("desired", 0))

    def _round(self, scene: Scene, wanted: Round, load: Load) -> Done:
        began = time.monotonic()
        done = carry_out(scene, wanted, self.faults)
        settled = scene.seen[-1]
        time.sleep(QUIET)
        unfair = shares(settled, scene.complete(), requests_of(load.records()))
        done = Done(done.events, (*done.violations, *(f"{title(done)}: {sentence}" for sentence in unfair)))
        recovered = done.settled - max(event.undone for event in done.events)
        took = time.monotonic() - began
        say(f"  {title(done)}: complete {recovered:.1f} s after its end, {took:.0f} s in all")
        for sentence in done.violations:
            say(f"    VIOLATED {sentence}")
        return done

    def _result(self, verdict: Verdict, rounds: list[Done]) -> dict[str, Any]:
        options = self.options
        return {
            "seed": options.seed,
            "minutes": options.minutes,
            "datapath": options.datapath,
            "soak": options.soak,
            "faults": options.faults,
            "machine": describe(),
            "planned": [] if options.soak else [list(one.faults) for one in self.plan],
            "injected": [[event.fault for event in one.events] for one in rounds],
            **asdict(verdict),
        }

    def _store_logs(self) -> None:
        (self.site.place / "manager.log").write_text(self.product.log())
        (self.site.place / "balancer.log").write_text(self.product.balancer_log())

    def _keep_logs(self) -> None:
        """For whoever looks into a violation."""
        if not (self.site.place / "manager.log").exists():  # the run has failed
            with suppress(OSError, SiteError):
                self._store_logs()
        start = f"{self.options.datapath}-{self.options.seed}"
        for name in ("manager.log", "balancer.log", "requests.jsonl"):
            with suppress(OSError):
                shutil.copy(self.site.place / name, RESULTS / f"{start}-{name}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/chaos/run.sh", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--datapath", choices=("bridge", "host"), default="bridge")
    parser.add_argument("--soak", choices=soak.LOADS, default="", help="a load without faults, steady or in waves")
    parser.add_argument("--faults", default="", help="names, separated by semicolons; default: all")
    parser.add_argument("--json", default="", help="file of the result")
    parser.add_argument("--report", nargs="+", default=[], help="stored results: writes docs/resilience.md from them")
    parser.add_argument("--balancer-image", default="")
    parser.add_argument("--server-image", default="")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the site is removed
    options = parse(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.report:
        report.write([json.loads(Path(name).read_text()) for name in options.report])
        return 0
    with tempfile.TemporaryDirectory(prefix="lbchaos", ignore_cleanup_errors=True) as place:
        try:
            result = Campaign(options, Path(place)).run()
        except SiteError as error:
            print(f"tests/chaos/run.sh: {error}", file=sys.stderr)
            return 1
    file = Path(options.json) if options.json else RESULTS / f"{options.datapath}-{options.seed}.json"
    file.write_text(json.dumps(result, indent=1))
    say(report.summary(result))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
