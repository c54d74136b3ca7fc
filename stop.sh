#!/usr/bin/env bash
# Waits for the open connections, then removes everything of this project, and nothing else.
#   ./stop.sh [--project NAME] [--now] [--images] [--engine]
#     --now      do not wait for open connections
#     --images   also remove all projects' images that are not in use
#     --engine   also stop the Docker Engine, if run.sh started it
# This script installs what is missing (Python, the packages in .venv). Then manager/cli/down.py stops the project.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh

FLAGS_ARE_VALID=10 # exit code of cli.arguments if a stop has to follow; every other code ends this script

open_streams
trap end_step EXIT
trap : PIPE # a closed standard output must not end this script, see say
LOG=run/setup.log

mkdir -p run
have python3 || need "reading the flags" python3 python3-venv
status=0
run_module python3 cli.arguments stop.sh "$@" || status=$?
[ "$status" -eq "$FLAGS_ARE_VALID" ] || exit "$status"
.venv/bin/python -c 'import docker' 2>/dev/null || make_venv # it is broken if the host has another Python now
PYTHONPATH=manager exec .venv/bin/python -m cli.down "$@"
