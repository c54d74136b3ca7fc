#!/usr/bin/env bash
# supervise.sh --project NAME [--backends N]: keeps one manager running. It starts the manager again, after 1 to 4
# seconds, when that ends unexpectedly; --backends is for the first start only, because later ones adopt the backends.
# It ends with the manager when that ended on request (0), has bad settings (2), or failed at the very first start.
# run.sh and stop.sh find both processes by `--project NAME` on their command lines.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=run/$LB_PROJECT
manager='' pause=1

# For people, and never half written. The manager runs on where the disk is full or the folder was deleted.
write_pid() { { echo "$2" >"$RUN/$1.pid.new" && mv -f "$RUN/$1.pid.new" "$RUN/$1.pid"; } || true; }

write_pid supervisor "$$"
trap 'trap "" TERM INT; [ -z "$manager" ] || kill -TERM "$manager" 2>/dev/null || true; wait; exit 0' TERM INT
for ((starts = 1; ; starts++)); do
    began=$SECONDS status=0
    .venv/bin/python "$PWD/manager/script.py" "$@" &
    manager=$!
    write_pid manager "$manager"
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
