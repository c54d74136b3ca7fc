#!/usr/bin/env bash
# supervise.sh --project NAME [--backends N]: keeps one manager running, and starts it again, after 1 to 4 seconds, when
# it ends by itself. --backends is for the first start only: later ones take over what runs. Ends with the manager when
# that was told to end (0), has bad settings (2), or could not start in the first place.
# run.sh and stop.sh find both processes by `--project NAME` on their command lines.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=run/$LB_PROJECT
manager='' pause=1

# For people, and never half written. Where the disk is full or the folder is gone, the manager runs on all the same.
note_pid() { { echo "$2" >"$RUN/$1.pid.new" && mv -f "$RUN/$1.pid.new" "$RUN/$1.pid"; } || true; }

note_pid supervisor "$$"
trap 'trap "" TERM INT; [ -z "$manager" ] || kill -TERM "$manager" 2>/dev/null || true; wait; exit 0' TERM INT
for ((starts = 1; ; starts++)); do
    began=$SECONDS status=0
    .venv/bin/python "$PWD/manager/script.py" "$@" &
    manager=$!
    note_pid manager "$manager"
    wait "$manager" || status=$?
    manager=
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "$status at start $starts" = "1 at start 1" ]; then exit "$status"; fi
    [ $((SECONDS - began)) -lt 30 ] || pause=1
    printf '%(%Y-%m-%d %H:%M:%S)T ERROR   manager ended with status %s; starting it again in %s s\n' -1 "$status" "$pause" \
        >>"$RUN/manager.log" || true
    sleep "$pause" &
    wait $!
    pause=$((pause < 4 ? pause * 2 : 4))
    set -- --project "$LB_PROJECT"
done
