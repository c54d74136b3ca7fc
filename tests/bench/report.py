"""Writes docs/benchmarks.md and its pictures from the results. Every figure in them comes from the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import texts
from bench.charts import bars
from bench.results import Results, Value
from bench.ways import BRIDGE_PATH, HAPROXY_HOST, HOST_PATH, PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
PAGE, PICTURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
LINE = 120  # characters


@dataclass(frozen=True)
class Target:
    """A ratio of two (way, backends), and what it should be at least."""

    quantity: str
    above: tuple[str, int]
    below: tuple[str, int]
    least: float

    def name(self) -> str:
        (above, many), (below, few) = self.above, self.below
        if above == below:
            return f"{above}: {many} backends to {few}, new connections"
        return f"{above}, to {below}: {self.quantity}, {many} backend{'s' * (many > 1)}"


def targets() -> list[Target]:
    found = []
    for path, limit, times in ((HOST_PATH, 0.95, 1.4), (BRIDGE_PATH, 0.78, 1.15)):
        for quantity in ("new connections", "keep-alive"):
            found.append(Target(quantity, (path, 1), (PUBLISHED, 1), limit))
        for quantity in ("new connections", "keep-alive"):
            found += [Target(quantity, (path, count), (HAPROXY_HOST, count), times) for count in (1, 3)]
    found += [Target("rules alone", (path, 1000), (path, 3), 0.97) for path in (HOST_PATH, BRIDGE_PATH)]
    found.append(Target("slow backend", ("this project, adaptive", 3), ("this project, equal", 3), 2.0))
    return found


def ratios(results: Results) -> str:
    """The table of all ratios that were measured, with their targets."""
    rows = []
    for target in targets():
        value = results.ratio(target.quantity, target.above, target.below)
        if value:
            rows.append((target.name(), value, target.least))
    value = sticky_ratio(results, 3)
    if value:
        rows.append(("sticky clients to clients that are not, new connections, 3 backends", value, 0.95))
    body = [[name, spread(value, 2), f"{least:g}", _met(value, least)] for name, value, least in rows]
    return table(["ratio", "median (least to most)", "target, at least", ""], body)


def _met(value: Value, least: float) -> str:
    return "met" if value.median >= least else "**not met**"


def sticky_ratio(results: Results, backends: int) -> Value | None:
    joined = Results(values={})
    for quantity in ("sticky", "not sticky"):
        for value in results.values.get((quantity, HOST_PATH, backends), []):
            joined.add("", quantity, backends, value)
    return joined.ratio("", ("sticky", backends), ("not sticky", backends))


# -- Markdown --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def spread(value: Value | None, digits: int) -> str:
    if value is None:
        return ""
    median, low, high = (f"{number:,.{digits}f}" for number in (value.median, value.low, value.high))
    return median if low == high else f"{median} ({low} to {high})"


def ordered(results: Results, quantity: str, backends: int) -> list[str]:
    """The ways in one order for all tables, whichever was measured first."""
    measured = results.ways(quantity, backends)
    return [way for way in texts.ORDER if way in measured] + [way for way in measured if way not in texts.ORDER]


Column = tuple[str, Callable[[str], Value | None], int]  # head, value of a way, digits


def ways_table(ways: Sequence[str], columns: Sequence[Column]) -> str:
    rows = [[way, *(spread(value(way), digits) for _, value, digits in columns)] for way in ways]
    return table(["", *(head for head, _, _ in columns)], rows)


def picture(results: Results, name: str, title: str, rows: Sequence[tuple[str, Value | None]], digits: int = 0) -> str:
    """Writes a chart and returns the Markdown that presents it."""
    drawn = [(label, value, label.startswith("this project")) for label, value in rows if value]
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{name}.svg").write_text(bars(title, drawn, digits))
    return f"![{title}](benchmarks/{name}.svg)"


# -- the sections ----------------------------------------------------------------------------------------------------


def rates(results: Results, backends: int) -> str:
    ways = ordered(results, "new connections", backends)

    def ratio(quantity: str, other: tuple[str, int]) -> Callable[[str], Value | None]:
        return lambda way: results.ratio(quantity, (way, backends), other)

    columns: list[Column] = []
    for quantity in ("new connections", "keep-alive"):
        columns.append((f"{quantity}/s", lambda way, q=quantity: results.value(q, way, backends), 0))
        columns.append(("to the published port", ratio(quantity, (PUBLISHED, backends)), 2))
    words = f"{backends} backend{'s' * (backends > 1)}"
    pictures = []
    for quantity in ("new connections", "keep-alive"):
        rows = [(way, results.value(quantity, way, backends)) for way in ways]
        name = f"{quantity.replace(' ', '-')}-{backends}"
        pictures.append(picture(results, name, f"{quantity} per second, {words}", rows))
    return "\n\n".join([ways_table(ways, columns), *pictures])


def costs(results: Results) -> str:
    ways = ordered(results, "download", 3)
    columns: list[Column] = [
        ("1 GiB, MB/s", lambda way: results.value("download", way, 3), 0),
        ("p50, ms", lambda way: results.value("latency p50", way, 3), 2),
        ("p99, ms", lambda way: results.value("latency p99", way, 3), 2),
        ("CPU seconds per 10,000", lambda way: results.value("CPU", way, 3), 2),
        ("memory, MiB", lambda way: results.value("memory", way, 3), 0),
    ]
    downloads = [(way, results.value("download", way, 3)) for way in ways]
    latencies = [(way, results.value("latency p99", way, 3)) for way in ways]
    return "\n\n".join(
        [
            ways_table(ways, columns),
            picture(results, "download", "one download of 1 GiB, MB/s", downloads),
            picture(results, "p99", "p99 of the latency at half load, ms", latencies, 2),
        ]
    )


def many_backends(results: Results) -> str:
    counts = results.counts("rules alone")
    ways = ordered(results, "rules alone", counts[0])
    columns: list[Column] = []
    for count in counts:
        columns.append((f"{count} backends", lambda way, n=count: results.value("rules alone", way, n), 0))
    columns.append((f"{counts[-1]} to {counts[0]}", lambda way: _growth(results, way, counts), 2))
    rows = [(way, _growth(results, way, counts)) for way in ways]
    title = f"new connections/s with {counts[-1]} backends, as a ratio to {counts[0]}"
    return "\n\n".join([ways_table(ways, columns), picture(results, "many-backends", title, rows, 2)])


def _growth(results: Results, way: str, counts: Sequence[int]) -> Value | None:
    return results.ratio("rules alone", (way, counts[-1]), (way, counts[0]))


def sticky(results: Results) -> str:
    rows = []
    for count in results.counts("sticky"):
        values = [results.value(quantity, HOST_PATH, count) for quantity in ("not sticky", "sticky")]
        rows.append([str(count), *(spread(value, 0) for value in values), spread(sticky_ratio(results, count), 2)])
    return table(["backends", "not sticky, new connections/s", "sticky", "ratio"], rows)


def slow(results: Results) -> str:
    ways = ordered(results, "slow backend", 3)
    equal = ("this project, equal", 3)
    columns: list[Column] = [
        ("requests/s", lambda way: results.value("slow backend", way, 3), 0),
        ("to equal shares", lambda way: results.ratio("slow backend", (way, 3), equal), 2),
    ]
    rows = [(way, results.value("slow backend", way, 3)) for way in ways]
    return "\n\n".join([ways_table(ways, columns), picture(results, "slow", "requests/s, one of three is slow", rows)])


def failures(results: Results) -> str:
    ways = ordered(results, "kill, failed requests", 3)
    columns: list[Column] = [
        ("failed requests of 1,200", lambda way: results.value("kill, failed requests", way, 3), 0),
        ("last failure after, s", lambda way: results.value("kill, last failure after", way, 3), 2),
        ("slowest answer, s", lambda way: results.value("kill, slowest answer", way, 3), 2),
    ]
    return ways_table(ways, columns)


def scale_out(results: Results) -> str:
    ways = results.ways("scale-out, first answer", 4)
    columns: list[Column] = [("first answer after, s", lambda way: results.value("scale-out, first answer", way, 4), 2)]
    return ways_table(ways, columns)


SECTIONS: Sequence[tuple[str, str, str, Callable[[Results], str]]] = (
    # The heading, the quantity that it needs, its text, and its tables.
    ("One backend", "new connections", texts.ONE, lambda results: rates(results, 1)),
    ("Three backends", "new connections", texts.THREE, lambda results: rates(results, 3)),
    ("Download, latency, processor time, memory", "download", texts.COSTS, costs),
    ("Many backends", "rules alone", texts.MANY, many_backends),
    ("Clients that keep their backend", "sticky", texts.STICKY, sticky),
    ("One slow backend", "slow backend", texts.SLOW, slow),
    ("A backend is killed", "kill, failed requests", texts.KILL, failures),
    ("A backend is added", "scale-out, first answer", texts.SCALE_OUT, scale_out),
)


def page(results: Results) -> str:
    """The whole page. Writes the pictures, too."""
    parts = [texts.HEAD, machine(results), "## Ratios\n\n" + texts.RATIOS, ratios(results)]
    for heading, quantity, text, section in SECTIONS:
        if results.counts(quantity):
            parts += [f"## {heading}", text, section(results)]
    parts += ["## Where this project loses", losses(results), texts.LOSSES]
    return "\n\n".join(parts) + "\n"


def machine(results: Results) -> str:
    rows = [[name, str(value)] for name, value in results.machine.items() if value != ""]
    return table(["", ""], rows)


BETTER_IF_LESS = ("latency p50", "latency p99", "CPU", "memory")
TIE = 0.02  # a smaller difference is none
PATHS = (HOST_PATH, BRIDGE_PATH, "this project, adaptive")
COMPARED = ("new connections", "keep-alive", "download", "rules alone", "slow backend", *BETTER_IF_LESS)


def losses(results: Results) -> str:
    """Each comparison in which other balancers are better than this project in the median, with the ratios."""
    rows = []
    for quantity in COMPARED:
        for count in results.counts(quantity):
            for path in PATHS:
                better = [f"{way} ({ratio:.2f})" for way, ratio in _better(results, quantity, count, path)]
                if better:
                    rows.append([texts.QUANTITIES.get(quantity, quantity), str(count), path, ", ".join(better)])
    return table(["", "backends", "", "better, and this project's ratio to it"], rows) if rows else "Nowhere."


def _better(results: Results, quantity: str, count: int, path: str) -> list[tuple[str, float]]:
    """The other balancers that are better by more than TIE, and the ratio of `path` to each."""
    found, ours = [], results.value(quantity, path, count)
    for way in ordered(results, quantity, count):
        theirs = results.value(quantity, way, count)
        if not ours or not theirs or way == PUBLISHED or way.startswith("this project"):
            continue
        ratio = ours.median / theirs.median
        if (ratio > 1 + TIE) if quantity in BETTER_IF_LESS else (ratio < 1 - TIE):
            found.append((way, ratio))
    return found


def write(results: Results) -> None:
    PAGE.write_text(page(results))
