#!/usr/bin/env bash
# Starts the load balancer, or applies changed settings to the running one. ./run.sh --help lists the settings.
# This script prepares what the start in manager/cli/up.py needs: Python, a Docker Engine and the packages in .venv.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh

FLAGS_ARE_VALID=10 # exit code of cli.arguments for a start; --help ends with another one

finish() {
    end_step
    [ "$1" -eq 0 ] || [ -z "${ENGINE_STARTED:-}" ] || stop_engine
    exit "$1"
}

open_streams
trap 'finish $?' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap : PIPE # see say
LOG=run/setup.log
mkdir -p run
case " $* " in *" --no-install "*) export NO_INSTALL=1 ;; esac
have python3 || need "reading the settings" python3 python3-venv
for word in "$@"; do
    case "$word" in
        --status | --watch | --doctor | --json) PYTHONPATH=manager exec python3 -m cli.arguments run.sh "$@" ;;
    esac
done
status=0
run_module python3 cli.arguments run.sh "$@" || status=$?
[ "$status" -eq "$FLAGS_ARE_VALID" ] || exit "$status"
ensure_engine
make_venv
PYTHONPATH=manager exec .venv/bin/python -m cli.up "$@"
