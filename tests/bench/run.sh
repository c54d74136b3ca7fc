#!/usr/bin/env bash
# Measures the load balancer beside the alternatives, in one interleaved run of its own containers.
#   sudo tests/bench/run.sh [--quick] [--rounds N] [--seconds N] [--json FILE]
#   tests/bench/run.sh --report FILE      writes docs/benchmarks.md from a stored result
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."
root=$PWD
# shellcheck source=manager/host.sh
. manager/host.sh

mkdir -p run
LOG=run/bench.log
: >"$LOG"
trap 'cd "$root"; end_step; [ -z "${ENGINE_STARTED:-}" ] || stop_engine' EXIT
have python3 || need "the benchmark" python3
export PYTHONPATH=$root/tests:$root/manager
case " $* " in
    *" --report "* | *" --help "*) cd "$from" && exec python3 -m bench.measure "$@" ;;
esac
for pair in ip:iproute2 iptables:iptables nsenter:util-linux; do
    have "${pair%%:*}" || need "the benchmark" "${pair#*:}"
done
ensure_engine
make_venv
tags=$(run_module .venv/bin/python cli.images balancer tests/bench/image)
read -r -d '' balancer bench <<<"$tags" || true # a line each
python=$root/.venv/bin/python
cd "$from"
"$python" -m bench.measure --balancer-image "$balancer" --bench-image "$bench" "$@"
