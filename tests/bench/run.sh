#!/usr/bin/env bash
# Measures the load balancer beside the alternatives, in one interleaved run of its own containers.
#   sudo tests/bench/run.sh [--quick] [--rounds N] [--seconds N] [--json FILE]
#   tests/bench/run.sh --report FILE      writes docs/benchmarks.md from a stored result
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/program.sh
. tests/program.sh
export PYTHONPATH=$PWD/tests:$PWD/manager
begin_program bench "the benchmark" bench.measure ip:iproute2 iptables:iptables nsenter:util-linux -- "$@"
tags=$(run_module .venv/bin/python cli.images balancer tests/bench/image)
read -r -d '' balancer bench <<<"$tags" || true # a line each
python=$PWD/.venv/bin/python
cd "$from"
"$python" -m bench.measure --balancer-image "$balancer" --bench-image "$bench" "$@"
