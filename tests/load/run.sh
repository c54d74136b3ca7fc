#!/usr/bin/env bash
# Lets one see the running system at work: a ramp, a plateau, a drop, and a picture of them.
#   sudo tests/load/run.sh [--project NAME] [--peak CONNECTIONS_PER_SECOND] [--seconds N] [--out FILE]
# Exit codes: 0 done and no request failed, 1 some failed, 2 bad use, 3 no system runs, 130 interrupted.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."
# shellcheck source=manager/host.sh
. manager/host.sh

mkdir -p run
LOG=run/load.log
trap end_step EXIT
export PYTHONPATH=$PWD/tests:$PWD/manager
demo=("$PWD/.venv/bin/python" "$PWD/tests/load/demo.py" "$@")
[ -x "${demo[0]}" ] || { say "no system was ever started here; ./run.sh starts it" >&2; exit 3; }

# The demo looks first whether there is anything to load, and says 127 where hey alone is missing.
if ! have hey; then
    status=0
    (cd "$from" && "${demo[@]}") || status=$?
    [ "$status" -eq 127 ] || exit "$status"
    need "making the load" hey
fi
cd "$from"
exec "${demo[@]}"
