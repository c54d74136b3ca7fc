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
trap 'end_step; [ -z "${ENGINE_STARTED:-}" ] || stop_engine' EXIT
have python3 || need "the benchmark" python3
ensure_engine
make_venv
tags=$(run_module .venv/bin/python cli.images balancer tests/bench/image)
read -r -d '' balancer bench <<<"$tags" || true # a line each
python3 tests/bench/bench.py --balancer-image "$balancer" --bench-image "$bench" "$@"
