"""The sentences of docs/benchmarks.md. They contain no results, only what was done and why a result is as it is."""

from bench.ways import (
    BRIDGE_PATH,
    COURSE,
    HAPROXY_BRIDGE,
    HAPROXY_HOST,
    HOST_PATH,
    KUBE,
    NGINX_BRIDGE,
    NGINX_HOST,
    PUBLISHED,
)

ORDER = (PUBLISHED, HOST_PATH, BRIDGE_PATH, KUBE, COURSE, HAPROXY_HOST, HAPROXY_BRIDGE, NGINX_HOST, NGINX_BRIDGE)
QUANTITIES = {
    "latency p50": "median latency (less is better)",
    "latency p99": "p99 of the latency (less is better)",
    "CPU": "processor time (less is better)",
    "memory": "memory (less is better)",
    "rules alone": "new connections through rules alone",
    "slow backend": "requests beside a slow backend",
}

HEAD = """\
# Benchmarks

`sudo tests/bench/run.sh --json FILE` measures everything on this page, and `tests/bench/run.sh --report FILE` writes
the page from the result. This result is `docs/benchmarks/results.json`.

The client is a host outside: a network namespace that is connected to the host by a veth, and is not on Docker's
bridge. Client, balancers and backends share the processors of one machine. So absolute figures say little about another
machine, and only ratios of values from one run should be quoted. Each round measures every way once and begins with
another one. Tables have the median of the rounds and, in brackets, the least and the most. Ratios are computed for each
round, then their median is taken.

| way | what it is |
|---|---|
| published port, no balancer | Docker's `-p` to one backend: the limit for any balancer |
| this project, host path | `./run.sh --datapath host`, with its manager and its balancer container running |
| this project, bridge path | `./run.sh` with its default, in the same way |
| kube-proxy's rules | the chains that kube-proxy writes for a node port, in the host's namespace |
| course project's rules | a list of DNAT rules with probabilities, in a container with a published port |
| HAProxy, nginx stream | TCP proxies, two threads, `random`; on the host's network, or with a published port |

Each backend is an nginx with one worker that answers with a short line. Rules of kube-proxy and of the course project
are written before and removed after each measurement, by the same flavours of iptables as this project's. During the
run the host's connection table is larger, and it forgets closed connections after one second. Otherwise each
measurement would find it fuller than the one before."""

RATIOS = """\
Targets were set before the measurements. *Rules alone* are the product's rules without its manager and its balancer's
client."""

ONE = """\
`wrk` keeps 48 connections busy (closed loop): each sends its next request when the last one was answered. *New
connections* use each connection for one request. *Keep-alive* uses the same connections for the whole time, so the
rules for a connection's first packet have no part in it. The published port is the limit, because a balancer has to do
at least the same: one DNAT on the host."""

THREE = """\
The same with three backends. The published port still has one backend. It is here so that its ratio is from the same
rounds. Three backends are three processes on the same processors."""

COSTS = """\
One connection loads 1 GiB (`curl`). Latency is measured at a fixed rate of new connections, half of what the slowest
way reached with three backends, by 16 programs `hey` with 8 workers each (`hey -q`). A worker that waits for an answer
skips its next request, so this is an open loop as long as answers take less than the time between a worker's requests.
Workers of one program send at the same moment, which is part of the median. Processor time is that of the whole machine
from `/proc/stat`, with client and backends, during the same load. Memory is that of the processes (PSS): for this
project the manager, its supervisor and the balancer container; for a proxy its container. Rules alone have none, and
the kernel's memory is not included."""

MANY = """\
The product's rules without its programs, for the addresses of one container. The cost in question is that of the
rules. 16 client addresses open 48 connections at a time. This project dispatches with a tree of chains, so a new
connection passes a few rules at any number of backends. kube-proxy and the course project have lists: a new connection
is compared with half of the rules on average."""

STICKY = """\
`--sticky` on the host path, rules alone, with 100,000 known clients in the sets. Each new connection adds its client to
two sets, or renews its time there. A known client is looked up in the set of one backend after the other until its own
is found, which is half of the backends on average. So the cost grows with the backends, as it does with kube-proxy's
`ClientIP` affinity."""

SLOW = """\
Three backends compute (the sample server). One may use a tenth of a processor, the others four tenths. 16 connections
send one request each, then connect again. Adaptive shares follow the backends' speed. Equal shares wait for the slow
backend. HAProxy's `leastconn` sends a new connection to the backend with the fewest open ones, which needs a proxy that
sees both ends of each connection."""

KILL = """\
A backend of three gets SIGKILL while 200 new connections per second arrive (open loop, `tests/bench/probe.py`). HAProxy
checks its backends every second and has `option redispatch 1`. The time is from the command to the end of the last
request that failed. A request that the killed backend had accepted is lost in each way. A client whose SYN was lost
sends it again after a second, so the slowest answer takes a little more than that."""

SCALE_OUT = """\
One more backend is ordered through the manager's socket, while 300 new connections per second arrive. The time is until
the first answer of the new backend. A new container has to be created, started and probed. A spare (`--spares 1`) runs
already and only enters rotation. In its slow start a new backend gets a small share of the connections at first."""

LOSSES = """\
The reasons, where the table above names one of these:

- **The bridge path to ways on the host's network.** Each packet passes Docker's rule for the published port, then a
  network namespace with a second connection table, and the bridge twice. `--datapath host` has none of these.
- **kube-proxy's rules.** They count nothing. This project counts the packets to each backend and finds the first reply
  of each connection, for its decisions, its shares and its detection of frozen backends. With few backends, lists are
  as fast as a tree.
- **HAProxy with `leastconn`.** A proxy knows immediately when a request ends. Adaptive shares follow an estimate
  that is made once an interval, and a slow backend still gets its share while it is slow.
- **Memory.** The manager and the balancer's client are Python programs. No packet passes them.
- **Sticky clients with many backends.** The sets of the backends are searched one after the other."""
