"""What clients see when a backend is killed, when one is added, and when one is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bench import load
from bench.host import RUN, docker
from bench.load import Probe, Probed
from bench.product import Product
from bench.ways import Way, product_way

if TYPE_CHECKING:
    from bench.measure import Bench

KILL_RATE, KILL_AFTER, KILL_SECONDS = 200, 2.0, 6.0  # requests per second, seconds
SCALE_RATE, SCALE_AFTER, SCALE_SECONDS = 300, 0.5, 4.0
CPUS = ("0.1", "0.4", "0.4")  # the limits of three backends
COMPUTE = "/?limit=100000"  # a request of which the sample server answers some hundred a second
SLOW_CONNECTIONS = 16
LEARN = 24.0  # seconds in which the shares follow the backends' speed
RETURN = 5.0  # seconds of load before a measurement: the shares are those of the load before

Kill = Callable[[], tuple[float, list[Probed]]]


# -- a backend is killed ---------------------------------------------------------------------------------------------


def kill_backend(bench: Bench, product: Product) -> Kill:
    """One of three backends of the product, which replaces it."""

    def kill() -> tuple[float, list[Probed]]:
        product.scale(3)
        time.sleep(2)
        return _kill_during_load(bench, product.port, product.names()[0])

    return kill


def kill_container(bench: Bench, way: Way) -> Kill:
    """One of the bench's own backends. It is started again with the same address."""
    container = f"{RUN}-backend-3"

    def kill() -> tuple[float, list[Probed]]:
        result = _kill_during_load(bench, way.port(3), container)
        docker("start", container)
        time.sleep(4)  # until the checks have found it
        return result

    return kill


def _kill_during_load(bench: Bench, port: int, container: str) -> tuple[float, list[Probed]]:
    probe = Probe(bench.client, port, KILL_RATE, KILL_SECONDS)
    time.sleep(KILL_AFTER)
    killed = time.time()
    docker("kill", container)
    return killed, probe.results()


def kills(bench: Bench, ways: Mapping[str, Kill], rounds: int) -> None:
    for _ in range(rounds):
        for name, kill in ways.items():
            killed, probed = kill()
            failed = [request for request in probed if not request.answer]
            last = max((request.sent + request.took - killed for request in failed), default=0.0)
            bench.results.add("kill, failed requests", name, 3, len(failed))
            bench.results.add("kill, last failure after", name, 3, round(max(0.0, last), 3))
            bench.results.add("kill, slowest answer", name, 3, round(max(r.took for r in probed if r.answer), 3))


# -- a backend is added ----------------------------------------------------------------------------------------------


def scale_out(bench: Bench, product: Product) -> None:
    """From the order to the first answer of the new backend: it is started, or it is a spare."""
    for spares in (0, 1):
        product.up("--spares", str(spares), "--min", "3")
        for _ in range(bench.rounds):
            product.scale(3, spares)
            time.sleep(1)
            value = _first_answer(bench, product)
            bench.results.add("scale-out, first answer", "a spare" if spares else "a new container", 4, round(value, 3))


def _first_answer(bench: Bench, product: Product) -> float:
    probe = Probe(bench.client, product.port, SCALE_RATE, SCALE_SECONDS)
    time.sleep(SCALE_AFTER)
    ordered = time.time()
    product.order(4)
    probed = probe.results()
    before = {request.answer for request in probed if request.sent < ordered}
    first = [r.sent + r.took for r in probed if r.answer and r.answer not in before]
    return min(first, default=float("nan")) - ordered


# -- a backend is slow -----------------------------------------------------------------------------------------------


def slow_backend(bench: Bench, products: Mapping[str, Product]) -> None:
    """One of three backends has a quarter of the others' processor time."""
    for product in products.values():
        for name, cpus in zip(product.names(), CPUS, strict=True):
            docker("update", "--cpus", cpus, name)
    ways = [product_way(product, name) for name, product in products.items()]
    ways.append(bench.site.leastconn(list(products.values())[1].addresses()))
    _computed(bench, ways[0], LEARN)
    bench.in_turn(ways, lambda way: _measure_computed(bench, way), "one slow backend")


def _measure_computed(bench: Bench, way: Way) -> None:
    _computed(bench, way, RETURN)
    bench.results.add("slow backend", way.name, 3, round(_computed(bench, way, 2 * bench.seconds).rate, 1))


def _computed(bench: Bench, way: Way, seconds: float) -> load.Answered:
    target = load.url(way.port(3), COMPUTE)
    return load.closed_loop(bench.client, target, seconds, new=True, connections=SLOW_CONNECTIONS)
