#!/usr/bin/env bash
# Measures new connections/s and keep-alive requests/s, direct and through everything there is to compare with, in one
# interleaved run of its own containers.   sudo tests/bench/run.sh [--quick] [--json FILE]
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=manager/host.sh
. manager/host.sh
mkdir -p run
LOG=run/bench.log
: >"$LOG"
LB_BASE_IMAGE=${LB_BASE_IMAGE:-debian:trixie-slim}
trap 'end_step; [ -z "${ENGINE_STARTED:-}" ] || stop_engine' EXIT
have python3 || need "the benchmark" python3
ensure_engine
BALANCER_IMAGE=lbscaler-balancer:$(digest balancer)
BENCH_IMAGE=lbscaler-bench:$(digest tests/bench/image)
build_image balancer "$BALANCER_IMAGE"
build_image tests/bench/image "$BENCH_IMAGE"
python3 tests/bench/bench.py --balancer-image "$BALANCER_IMAGE" --bench-image "$BENCH_IMAGE" "$@"
