#!/usr/bin/env bash
# supervise.sh --project NAME [--backends N]: keeps one manager running. If the manager ends unexpectedly, it is started
# again after 1 to 4 seconds. --backends is for the first start only, because later ones adopt the backends.
# The supervisor ends with the manager if that ends on request (0), has an invalid setting (2) or fails at its first
# start. run.sh and stop.sh find both processes by `--project NAME` on their command lines.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=run/$LB_PROJECT
manager='' pause=1

# The pid files are for people, and are replaced atomically. If one cannot be written (the disk is full, the folder was
# deleted), the manager still runs.
write_pid() { { echo "$2" >"$RUN/$1.pid.new" && mv -f "$RUN/$1.pid.new" "$RUN/$1.pid"; } || true; }

write_pid supervisor "$$"
# A signal for the supervisor ends the manager first; later signals are ignored until it has ended.
trap 'trap "" TERM INT; [ -z "$manager" ] || kill -TERM "$manager" 2>/dev/null || true; wait; exit 0' TERM INT
for ((starts = 1; ; starts++)); do
    began=$SECONDS status=0
    .venv/bin/python "$PWD/manager/script.py" "$@" &
    manager=$!
    write_pid manager "$manager"
    wait "$manager" || status=$?
    manager=
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || { [ "$status" -eq 1 ] && [ "$starts" -eq 1 ]; }; then
        exit "$status"
    fi
    # A manager that ran for a while did not fail at its start, so the next one need not wait for long.
    [ $((SECONDS - began)) -lt 30 ] || pause=1
    printf '%(%Y-%m-%d %H:%M:%S)T ERROR   manager ended with status %s; starting it again in %s s\n' \
        -1 "$status" "$pause" >>"$RUN/manager.log" || true
    # In the background, because bash handles a signal during `wait`, but not during `sleep`.
    sleep "$pause" &
    wait $!
    pause=$((pause < 4 ? pause * 2 : 4))
    set -- --project "$LB_PROJECT"
done
