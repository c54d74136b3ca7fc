#!/usr/bin/env bash
# A campaign of faults on a live system under load, on a host of its own: a network namespace with its own engine. With
# --swarm: on three such hosts, which are a Swarm.
#   sudo tests/chaos/run.sh [--seed S] [--minutes M] [--datapath bridge|host | --swarm] [--faults NAMES]
#                           [--soak KIND] [--json FILE]
#       --seed S        the same seed and minutes inject the same faults in the same order; default 1
#       --minutes M     how long, about; default 3, with --swarm 20
#       --faults NAMES  only these, separated by semicolons
#       --soak KIND     no faults, but for the whole time a load that is steady or comes in waves: wave
#       --json FILE     where the result is stored; default run/chaos/DATAPATH-SEED.json, swarm-SEED.json
#   tests/chaos/run.sh --report FILE…    writes docs/resilience.md from stored results
# Exit codes: 0 all invariants held, 1 one was violated or the run failed, 2 bad use.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/program.sh
. tests/program.sh
export PYTHONPATH=$PWD/tests
more=()
case " $* " in *" --swarm "*) more=(docker-registry:docker-registry openssl:openssl) ;; esac
# It needs the engine only for building the images.
begin_program chaos "the campaign" chaos.main ip:iproute2 iptables:iptables ipset:ipset nsenter:util-linux curl:curl \
    sysctl:procps "${more[@]}" -- "$@"
tags=$(run_module .venv/bin/python cli.images balancer server)
read -r -d '' balancer server <<<"$tags" || true # a line each
cd "$from"
python3 -m chaos.main --balancer-image "$balancer" --server-image "$server" "$@"
