#!/bin/bash
# Runs the backend's two programs, passes SIGTERM on to both, and ends when the workload has ended.
#   script.sh         serve                      script.sh alive           Docker's health check
set -euo pipefail
cd "$(dirname "$0")"

# Healthy with any HTTP status: a draining or saturated backend does not have to be replaced.
if [ "${1:-}" = alive ]; then
    exec 3<>/dev/tcp/127.0.0.1/5000
    printf 'GET /sync HTTP/1.0\r\n\r\n' >&3
    read -r -t 8 answer <&3
    [[ "$answer" == HTTP/* ]]
    exit
fi

python3 server.py &
server=$!
python3 synchronization_server.py &
sync=$!
stopping=
trap 'stopping=1; kill -TERM "$server" "$sync" 2>/dev/null || true' TERM INT

# A trapped signal ends `wait` early, so its status does not show whether a program has ended.
while kill -0 "$server" 2>/dev/null && kill -0 "$sync" 2>/dev/null; do
    wait -n "$server" "$sync" || true
done
[ -n "$stopping" ] || echo "script.sh: a program has ended; ending the container so that it is replaced" >&2

status=0
kill -TERM "$server" 2>/dev/null || true
while kill -0 "$server" 2>/dev/null; do wait "$server" || status=$?; done
# synchronization_server.py answers "draining" until here, and does not exit on SIGTERM. It has no requests to finish.
kill -KILL "$sync" 2>/dev/null || true
[ -n "$stopping" ] || exit $((status ? status : 1))
