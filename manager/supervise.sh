#!/usr/bin/env bash
# Keeps one manager running: starts it again, after 1 to 4 seconds, when it ends by itself. What it is told to begin with
# (--backends N) is for the first start only: later ones take over what runs. Ends with the manager when that was told to
# end (0), has bad settings (2), or could not start in the first place.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=run/$LB_PROJECT
manager='' pause=1

echo "$$" >"$RUN/supervisor.pid"
trap 'trap "" TERM INT; [ -z "$manager" ] || kill -TERM "$manager" 2>/dev/null || true; wait; exit 0' TERM INT
for ((starts = 1; ; starts++)); do
    began=$SECONDS status=0
    .venv/bin/python manager/script.py "$@" &
    manager=$!
    echo "$manager" >"$RUN/manager.pid"
    wait "$manager" || status=$?
    manager=
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "$status at start $starts" = "1 at start 1" ]; then exit "$status"; fi
    [ $((SECONDS - began)) -lt 30 ] || pause=1
    printf '%(%Y-%m-%d %H:%M:%S)T ERROR   manager ended with status %s; starting it again in %s s\n' -1 "$status" "$pause" \
        >>"$RUN/manager.log"
    sleep "$pause" &
    wait $!
    pause=$((pause < 4 ? pause * 2 : 4))
    set --
done
