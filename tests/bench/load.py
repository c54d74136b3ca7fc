"""The programs that make the load, and what they and the kernel report.

wrk sends the next request when the last one was answered (closed loop): the rate is the result. hey sends at a given
rate (open loop): the latency is the result. curl loads one large file. probe.py is for single failed requests.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.host import CLIENTS, HOST, BenchError, Client, run

CONNECTIONS = 48  # of wrk
LANES, WORKERS = 16, 8  # hey's workers send at the same moment, so several start a little apart
TIMEOUT = 10  # seconds until a request without an answer has failed
PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Answered:
    """Requests per second with a good answer, and how many had none."""

    rate: float
    failed: int


def url(port: int, path: str = "/") -> str:
    return f"http://{HOST}:{port}{path}"


def closed_loop(client: Client, target: str, seconds: float, *, new: bool, connections: int = CONNECTIONS) -> Answered:
    """`new`: a new connection for each request."""
    close = ["-H", "Connection: close"] if new else []
    command = ["wrk", "-t2", f"-c{connections}", f"-d{seconds:g}s", *close, target]
    return parse_wrk(run(*client.command(*command)))


def many_clients(client: Client, port: int, seconds: float) -> Answered:
    """New connections from CLIENTS addresses, one for each thread of wrk."""
    command = ["wrk", f"-t{CLIENTS}", f"-c{3 * CLIENTS}", f"-d{seconds:g}s", "-H", "Connection: close"]
    return parse_wrk(run(*client.command(*command, "-s", "/bench/clients.lua", url(port))))


def parse_wrk(text: str) -> Answered:
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    duration = re.search(r"requests in ([\d.]+)(ms|s|m)", text)
    if not rate or not duration:
        raise BenchError(f"wrk: {text}")
    bad = sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    errors = sum(int(number) for number in re.findall(r"(?:connect|timeout) (\d+)", text))
    seconds = float(duration[1]) * {"ms": 0.001, "s": 1, "m": 60}[duration[2]]
    return Answered(float(rate[1]) - bad / seconds, bad + errors)


@dataclass(frozen=True)
class Latency:
    """Milliseconds from before the connection to the last byte; seconds of all processors for 10,000 requests."""

    p50: float
    p99: float
    cpu: float
    answered: int
    wanted: int


def open_loop(client: Client, target: str, rate: float, seconds: float) -> Latency:
    """New connections at `rate` per second."""
    pace = rate / LANES / WORKERS
    command = ["hey", "-z", f"{seconds:g}s", "-c", f"{WORKERS}", "-q", f"{pace:.4f}", "-t", f"{TIMEOUT}"]
    command += ["-disable-keepalive", "-o", "csv", target]
    before, lanes = busy_seconds(), []
    for _ in range(LANES):
        lanes.append(subprocess.Popen(client.command(*command), stdout=subprocess.PIPE, text=True))
        time.sleep(1 / pace / LANES)
    outputs = [lane.communicate()[0] for lane in lanes]
    used = busy_seconds() - before
    took = sorted(seconds_taken(outputs))
    if not took:
        raise BenchError(f"hey got no answer from {target}")
    p50, p99 = (1000 * quantile(took, part) for part in (0.5, 0.99))
    return Latency(p50, p99, 10_000 * used / len(took), len(took), round(rate * seconds))


def seconds_taken(outputs: Sequence[str]) -> list[float]:
    """The time of each answer with status 200 in hey's CSV."""
    taken = []
    for text in outputs:
        rows = csv.DictReader(text.splitlines())
        taken += [float(row["response-time"]) for row in rows if row["status-code"] == "200"]
    return taken


def quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def busy_seconds() -> float:
    """Seconds in which a processor of this machine worked, since it started."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def download(client: Client, port: int) -> float:
    """MB/s of one connection that loads 1 GiB."""
    command = ["curl", "-s", "-f", "-o", "/dev/null", "-w", "%{speed_download}", url(port, "/large")]
    return float(run(*client.command(*command))) / 1e6


@dataclass(frozen=True)
class Probed:
    """One request of probe.py: when it was sent (seconds since 1970), its duration, its answer (empty: failed)."""

    sent: float
    took: float
    answer: str


class Probe:
    """New connections at a low rate, whose single results are kept."""

    def __init__(self, client: Client, port: int, rate: int, seconds: float) -> None:
        command = client.python(PROBE, HOST, str(port), str(rate), str(seconds))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def results(self) -> list[Probed]:
        output, _ = self._process.communicate()
        return [Probed(*row) for row in json.loads(output)]
