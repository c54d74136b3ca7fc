"""The sentences of docs/benchmarks.md. They contain no figures of results."""

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

HEAD = "# Benchmarks"
RATIOS = ONE = THREE = COSTS = MANY = STICKY = SLOW = KILL = SCALE_OUT = LOSSES = "TEXT"
