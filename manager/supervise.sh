#!/usr/bin/env bash
# supervise.sh --project NAME: keeps one manager running. If the manager ends unexpectedly, it is started again after 1
# to 4 seconds. The supervisor ends with the manager if that ends on request (0), has an invalid setting (2), has been
# replaced by another manager (4), or fails at its first start.
# run.sh and stop.sh find both processes by `--project NAME` on their command lines.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=run/$2
manager='' pause=1

# What the manager is started with; run.sh has written it.
# shellcheck source=/dev/null
. "$RUN/environment"

# The pid files are for people, and are replaced atomically. If one cannot be written (the disk is full, the folder was
# deleted), the manager still runs.
write_pid() { { echo "$2" >"$RUN/$1.pid.new" && mv -f "$RUN/$1.pid.new" "$RUN/$1.pid"; } || true; }

write_pid supervisor "$$"
# A signal for the supervisor ends the manager first; later signals are ignored until it has ended.
trap 'trap "" TERM INT; [ -z "$manager" ] || kill -TERM "$manager" 2>/dev/null || true; wait; exit 0' TERM INT
for ((starts = 1; ; starts++)); do
    began=$SECONDS status=0
    # How many backends to begin with; from run.sh. The manager removes the file once it has adopted the fleet.
    backends=$(cat "$RUN/backends" 2>/dev/null || true)
    .venv/bin/python "$PWD/manager/script.py" "$@" ${backends:+--backends "$backends"} &
    manager=$!
    write_pid manager "$manager"
    wait "$manager" || status=$?
    manager=
    case $status in
        0 | 2 | 4) exit "$status" ;;
        1) [ "$starts" -gt 1 ] || exit 1 ;;
    esac
    # A manager that ran for a while did not fail at its start, so the next one need not wait for long.
    [ $((SECONDS - began)) -lt 30 ] || pause=1
    printf '%(%Y-%m-%d %H:%M:%S)T ERROR   manager ended with status %s; starting it again in %s s\n' \
        -1 "$status" "$pause" >>"$RUN/manager.log" || true
    # In the background, because bash handles a signal during `wait`, but not during `sleep`.
    sleep "$pause" &
    wait $!
    pause=$((pause < 4 ? pause * 2 : 4))
done
