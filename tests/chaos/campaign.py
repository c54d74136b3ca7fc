"""A seeded campaign of faults on a live system under load, on a host of its own."""

from __future__ import annotations

import argparse
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos import invariants, soak
from chaos.machine import describe
from chaos.observe import foreign
from chaos.plan import Round, plan
from chaos.product import Load, Product
from chaos.rounds import Scene, carry_out
from chaos.site import HOST, Site, SiteError, wait_for
from chaos.table import of_path
from chaos.verdict import Done, Verdict, judge, requests_of, title
from checkout import ROOT
from swarm.cluster import Node

IMAGE = "lbchaos-backend"
WARM_UP = 8.0  # seconds of load before the first fault: past the slow start
RESULTS = ROOT / "run" / "chaos"


def say(text: str) -> None:
    print(text, flush=True)


def build_backend(site: Site | Node, base: str) -> None:
    folder = Path(__file__).with_name("image")
    site.docker("build", "-q", "-t", IMAGE, "--build-arg", f"BASE={base}", str(folder))


def add_others(site: Site | Node, image: str) -> None:
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
        self.options = options
        self.machine: dict[str, str | int] = {}
        self._set_up(place)
        every = of_path(options.datapath)
        chosen = options.faults.split(";") if options.faults else [fault.name for fault in every]
        self.faults = {fault.name: fault for fault in every if fault.name in chosen}
        self.plan: list[Round] = plan(options.seed, options.minutes, list(self.faults.values()))

    def _set_up(self, place: Path) -> None:
        self.site = Site(place)
        flags = soak.FOLLOWING if self.options.soak == soak.WAVE else ()
        self.product = Product(self.site, self.options.datapath, IMAGE, *flags)

    def _open(self) -> None:
        say("Making a host with an engine of its own")
        self.site.open([self.options.balancer_image, self.options.server_image])
        self.machine = describe(self.site)
        build_backend(self.site, self.options.server_image)
        add_others(self.site, IMAGE)

    def _start(self) -> None:
        say(f"Starting the system, data path {self.options.datapath}")
        self.product.up()

    def _scene(self, before: list[str]) -> Scene:
        return Scene(self.site, self.product, before)

    def _foreign(self) -> list[str]:
        return foreign(self.site)

    def _load(self) -> Load:
        wave = self.options.minutes * 60 / soak.WAVES if self.options.soak == soak.WAVE else 0
        return Load(self.site.on_outside(), HOST, self.site.place / "requests.jsonl", "--wave", str(wave))

    def run(self) -> dict[str, Any]:
        try:
            self._open()
            before = self._foreign()
            self._start()
            verdict, rounds = self._under_load(before)
            self._store_logs()
            say("Stopping the system")
            self.product.down()
            changed = invariants.changed_foreign(before, self._foreign())
            verdict.violations += [f"after stop.sh: {sentence}" for sentence in changed]
            return self._result(verdict, rounds)
        finally:
            self._keep_logs()
            self.site.close()

    def _under_load(self, before: list[str]) -> tuple[Verdict, list[Done]]:
        options = self.options
        scene = self._scene(before)
        load = self._load()
        try:
            time.sleep(WARM_UP)
            self._wait_until_complete(scene)
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

    def _wait_until_complete(self, scene: Scene) -> None:
        try:
            wait_for(lambda: not self._missing(scene), "the system is complete", 60)
        except SiteError as error:
            raise SiteError(f"{error}: {'; '.join(self._missing(scene))}") from error

    def _missing(self, scene: Scene) -> list[str]:
        """What a system that has just started still lacks. A load in waves chooses the number of backends."""
        seen = scene.complete()
        return invariants.unsettled(seen, seen.status.get("desired", 0)) if self.options.soak else scene.violated(seen)

    def _round(self, scene: Scene, wanted: Round, load: Load) -> Done:
        began = time.monotonic()
        done = carry_out(scene, wanted, self.faults)
        settled = scene.seen[-1]
        time.sleep(scene.quiet)
        unfair = scene.unfair(settled, scene.complete(), requests_of(load.records()))
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
            "machine": self.machine,
            "planned": [] if options.soak else [list(one.faults) for one in self.plan],
            "injected": [[event.fault for event in one.events] for one in rounds],
            "events": [asdict(event) for one in rounds for event in one.events],
            **asdict(verdict),
        }

    def _store_logs(self) -> None:
        for name, text in self.product.logs().items():
            (self.site.place / name).write_text(text)

    def _keep_logs(self) -> None:
        """For whoever looks into a violation."""
        if not list(self.site.place.glob("manager*.log")):  # the run has failed
            with suppress(OSError, SiteError):
                self._store_logs()
        start = f"{self.options.datapath}-{self.options.seed}"
        files = [file for pattern in ("*.log", "*.jsonl") for file in self.site.place.glob(pattern)]
        for file in files:
            with suppress(OSError):
                shutil.copy(file, RESULTS / f"{start}-{file.name}")
