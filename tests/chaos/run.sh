#!/usr/bin/env bash
# A campaign of faults on a live system under load, on a host of its own: a network namespace with its own engine.
#   sudo tests/chaos/run.sh [--seed S] [--minutes M] [--datapath bridge|host] [--faults NAMES] [--soak KIND] [--json FILE]
#       --seed S        the same seed and minutes inject the same faults in the same order; default 1
#       --minutes M     how long, about; default 3
#       --faults NAMES  only these, separated by semicolons
#       --soak KIND     no faults, but for the whole time a load that is steady or comes in waves: wave
#       --json FILE     where the result is stored; default run/chaos/DATAPATH-SEED.json
#   tests/chaos/run.sh --report FILE…    writes docs/resilience.md from stored results
# Exit codes: 0 all invariants held, 1 one was violated or the run failed, 2 bad use.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."
root=$PWD
# shellcheck source=manager/host.sh
. manager/host.sh

mkdir -p run
LOG=run/chaos.log
: >"$LOG"
trap 'cd "$root"; end_step; [ -z "${ENGINE_STARTED:-}" ] || stop_engine' EXIT
have python3 || need "the campaign" python3
export PYTHONPATH=$root/tests
case " $* " in
    *" --report "* | *" --help "*) cd "$from" && exec python3 -m chaos.campaign "$@" ;;
esac
for pair in ip:iproute2 iptables:iptables ipset:ipset nsenter:util-linux curl:curl sysctl:procps; do
    have "${pair%%:*}" || need "the campaign" "${pair#*:}"
done
ensure_engine # only for building the images
make_venv
tags=$(run_module .venv/bin/python cli.images balancer server)
read -r -d '' balancer server <<<"$tags" || true # a line each
cd "$from"
python3 -m chaos.campaign --balancer-image "$balancer" --server-image "$server" "$@"
