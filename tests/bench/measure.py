"""Measures what users of this load balancer have, beside the alternatives, in one run of its own containers.

tests/bench/run.sh calls it. The client is a host outside, in a network namespace connected by a veth. All programs
share this machine's processors, so only ratios of values that were measured in turn mean anything: each round measures
every way once, and begins with another one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import faults, load, report
from bench.host import BenchError, Client, prepared
from bench.machine import describe
from bench.product import Product, running
from bench.results import Results
from bench.ways import (
    HAPROXY_HOST,
    HOST_PATH,
    Site,
    Way,
    many,
    nginx_products,
    product_way,
    sample_products,
)

SIZES = (3, 10, 100, 1000)
KNOWN_CLIENTS = 100_000
STICKY = 3600  # seconds
LATENCY_SECONDS = 3
SETTLE = 0.3  # seconds after many rules were written
KINDS = {"new connections": True, "keep-alive": False}
QUICK_RATE = 300.0  # per second, for --quick, which has no figures to choose a rate from


@dataclass
class Bench:
    site: Site
    client: Client
    results: Results
    rounds: int
    seconds: float

    def in_turn(self, ways: Sequence[Way], measure: Callable[[Way], None], title: str) -> None:
        """Measures each way in each round. Each round begins with another way."""
        for round_ in range(self.rounds):
            say(f"{title}: round {round_ + 1} of {self.rounds}")
            first = round_ % len(ways)
            for way in [*ways[first:], *ways[:first]]:
                measure(way)

    def rate(self, way: Way, backends: int, ips: Sequence[str]) -> None:
        """New connections and keep-alive requests per second."""
        with way.active(ips):
            for kind, new in KINDS.items():
                answered = load.closed_loop(self.client, load.url(way.port(backends)), self.seconds, new=new)
                self.note(kind, way, backends, answered)

    def note(self, quantity: str, way: Way, backends: int, answered: load.Answered) -> None:
        self.results.add(quantity, way.name, backends, round(answered.rate, 1))
        if answered.failed:
            self.results.add(f"{quantity}, failed", way.name, backends, answered.failed)

    def new_connections(self, quantity: str, way: Way, backends: int) -> None:
        with way.active(many(backends)):
            time.sleep(SETTLE)
            answered = load.many_clients(self.client, way.port(backends), self.seconds)
            self.note(quantity, way, backends, answered)

    def download(self, way: Way) -> None:
        with way.active(self.site.ips):
            self.results.add("download", way.name, 3, round(load.download(self.client, way.port(3))))

    def latency(self, way: Way, rate: float) -> None:
        with way.active(self.site.ips):
            found = load.open_loop(self.client, load.url(way.port(3)), rate, LATENCY_SECONDS * self.seconds / 2)
        self.results.add("latency p50", way.name, 3, round(found.p50, 3))
        self.results.add("latency p99", way.name, 3, round(found.p99, 3))
        self.results.add("CPU", way.name, 3, round(found.cpu, 3))
        self.results.add("latency, answered", way.name, 3, round(found.answered / found.wanted, 4))


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)


# -- the parts of a run ----------------------------------------------------------------------------------------------


def traffic(bench: Bench, ways: Sequence[Way], products: Sequence[Product], counts: Sequence[int]) -> None:
    """All ways with one backend and with three."""
    for count in counts:
        for product in products:
            product.scale(count)
        time.sleep(bench.seconds * 2)  # out of the new backends' slow start
        ips = bench.site.ips[:count]
        bench.in_turn(ways, lambda way, n=count, ips=ips: bench.rate(way, n, ips), f"{count} backends")


def one_file_latency_memory(bench: Bench, ways: Sequence[Way], rate: float) -> None:
    bench.in_turn(ways, bench.download, "download")
    bench.in_turn(ways, lambda way: bench.latency(way, rate), f"{rate:.0f} new connections/s")
    for way in ways:
        processes = way.processes()
        if processes:
            bench.results.add("memory", way.name, 3, round(sum(map(memory, processes)), 1))


def memory(process: int) -> float:
    """MiB, with its part of what it shares with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def half_load(results: Results) -> float:
    """Half of what the slowest way reached with three backends."""
    rates = [results.value("new connections", way, 3) for way in results.ways("new connections", 3)]
    return min(value.median for value in rates if value) / 2


def sizes(bench: Bench, ways: Sequence[Way], counts: Sequence[int]) -> None:
    """Rules alone, over many addresses of one container."""

    def measure(way: Way) -> None:
        for count in counts:
            bench.new_connections("rules alone", way, count)

    bench.in_turn(ways, measure, "many backends")


def sticky(bench: Bench, plain: Way, known: Way, counts: Sequence[int]) -> None:
    def measure(way: Way) -> None:
        for count in counts:
            bench.new_connections("sticky" if way is known else "not sticky", way, count)

    bench.in_turn([plain, known], measure, "sticky clients")


def quick(bench: Bench, products: dict[str, Product]) -> None:
    """A part of everything, once."""
    site, project_ways = bench.site, [product_way(product, name) for name, product in products.items()]
    host, plain = site.host_rules(), site.host_rules(STICKY, KNOWN_CLIENTS)
    ways = [site.published_port(), *project_ways, site.haproxy(on_host=True), site.kube_proxy(), site.course()]
    with running(list(products.values())):
        traffic(bench, ways, list(products.values()), (3,))
        one_file_latency_memory(bench, ways[:2], QUICK_RATE)
        sizes(bench, [host], (1000,))
        sticky(bench, host, plain, (3,))
        faults.kills(bench, {HOST_PATH: faults.kill_backend(bench, products[HOST_PATH])}, rounds=1)


def full(bench: Bench, products: dict[str, Product]) -> None:
    site, project_ways = bench.site, [product_way(product, name) for name, product in products.items()]
    haproxy, kube, course = site.haproxy(on_host=True), site.kube_proxy(), site.course()
    proxies = [haproxy, site.haproxy(on_host=False), site.nginx_stream(on_host=True), site.nginx_stream(on_host=False)]
    ways = [site.published_port(), *project_ways, *proxies, kube, course]
    with running(list(products.values())):
        traffic(bench, ways, list(products.values()), (1, 3))
        one_file_latency_memory(bench, ways, half_load(bench.results))
        kills = {name: faults.kill_backend(bench, product) for name, product in products.items()}
        kills[HAPROXY_HOST] = faults.kill_container(bench, haproxy)
        faults.kills(bench, kills, bench.rounds)
        faults.scale_out(bench, products[HOST_PATH])
    host_rules = site.host_rules()
    sizes(bench, [host_rules, site.bridge_rules(), kube, course], SIZES)
    sticky(bench, host_rules, site.host_rules(STICKY, KNOWN_CLIENTS), SIZES)
    samples = sample_products()
    with running(list(samples.values())):
        faults.slow_backend(bench, samples)


# -- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/bench/run.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--balancer-image", help=argparse.SUPPRESS)
    parser.add_argument("--bench-image", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a part of it: one round of one second")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="N", help="of one value; default: %(default)g")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single result there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only write docs/benchmarks.md from this JSON")
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> Results:
    """Writes the results also after an error, because a full run takes long."""
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    results = Results(describe(options.bench_image, rounds, seconds))
    try:
        with prepared():
            site = Site(options.bench_image, options.balancer_image)
            bench = Bench(site, Client(options.bench_image), results, rounds, seconds)
            (quick if options.quick else full)(bench, nginx_products(options.bench_image))
    finally:
        if options.json:
            results.write(options.json)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        report.write(Results.read(options.report))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # through every finally, so that nothing stays on the host
    try:
        results = run_all(options)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    print(report.ratios(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
