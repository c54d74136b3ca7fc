#!/usr/bin/env bash
# Starts the load balancer, or applies changed settings to the running one. ./run.sh --help lists the settings.
# This script installs what is missing (Python, a Docker Engine, the packages in .venv). Then manager/cli/up.py starts
# the project.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh

FLAGS_ARE_VALID=10 # exit code of cli.arguments if a start has to follow; every other code ends this script

# finish STATUS: up.py stops the engine itself if its run fails, so this is for failures before up.py.
finish() {
    end_step
    [ "$1" -eq 0 ] || [ -z "$ENGINE_STARTED" ] || stop_unused_engine || true
    exit "$1"
}

open_streams
trap 'finish $?' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap : PIPE # a closed standard output must not end this script, see say
LOG=run/setup.log
mkdir -p run
case " $* " in *" --no-install "*) export NO_INSTALL=1 ;; esac
# The flags are checked before anything else is installed, and some need neither an engine nor .venv.
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
# Until up.py handles the signals: one that ended Python before would leave the engine that was started.
[ -z "$ENGINE_STARTED" ] || trap '' INT TERM HUP
PYTHONPATH=manager exec .venv/bin/python -m cli.up "$@"
