#!/bin/bash
# The balancer container's first process. Installs the first NAT rules for the addresses in ip.txt, then keeps the
# client running. Traffic flows before the client starts and while it restarts: if the client were the container's first
# process, the container's rules and flows would end with it.
#   script.sh                 serve
#   script.sh rules           print the first rules
#   script.sh check           print what the kernel lacks
#   script.sh alive           Docker's health check
#   script.sh drain SECONDS   accept no new connections, and wait until the open ones end
#   script.sh remove          remove the project's rules from the host's namespace
set -euo pipefail
cd "$(dirname "$0")"

HTTP=${LB_HTTP:-127.0.0.1:5000}

alive() {
    exec 3<>"/dev/tcp/${HTTP%:*}/${HTTP#*:}"
    printf 'GET /sync HTTP/1.0\r\n\r\n' >&3
    head -n 1 <&3 | grep -q ' 200 '
}

# install_first_rules: with the first flavour of iptables that accepts them. legacy is tried first, because its rules
# cost a packet less time. The raw table is optional.
install_first_rules() {
    local nat raw
    nat=$(python3 first_rules.py nat)
    raw=$(python3 first_rules.py raw)
    for IPTABLES in legacy nft; do
        "iptables-$IPTABLES-restore" --noflush -w 5 <<<"$nat" || continue
        "iptables-$IPTABLES-restore" --noflush -w 5 <<<"$raw" || echo "script.sh: no rules in the raw table" >&2
        export IPTABLES
        return
    done
    echo "script.sh: neither flavour of iptables accepts the first rules; does the container have NET_ADMIN?" >&2
    return 1
}

# choose_flavour: on the host, that of Docker's rules. No first rules are needed there: the rules outlive this
# container.
choose_flavour() {
    export IPTABLES=nft
    # A call of iptables-legacy would create its tables, so ask the kernel for them.
    if [[ $(iptables-nft-save -t nat) != *':DOCKER '* ]] && grep -qx nat /proc/net/ip_tables_names; then
        IPTABLES=legacy
    fi
}

serve() {
    trap 'leave' TERM INT
    if [ -n "${LB_BRIDGE:-}" ]; then choose_flavour; else install_first_rules; fi
    echo "$IPTABLES" >/run/flavour
    local status
    while true; do
        python3 synchronization_client.py &
        echo $! >/run/client.pid
        status=0
        wait $! || status=$?
        pause
        # During a drain, a client would write the rules again. After it, the container has usually been removed.
        while [ -e /run/draining ]; do pause; done
        echo "script.sh: the client ended with status $status; starting it again" >&2
    done
}

# pause: in the background, because bash handles SIGTERM only between commands and during `wait`.
pause() {
    sleep 0.5 &
    wait $!
}

# leave: ends the container. In a Swarm, it first waits for the open connections, because stop.sh cannot do so there.
leave() {
    [ -z "${LB_LEAVE:-}" ] || drain "$LB_LEAVE"
    exit 0
}

# drain SECONDS: for stop.sh, which has stopped the manager before.
drain() {
    trap 'rm -f /run/draining' EXIT
    touch /run/draining
    kill -TERM "$(cat /run/client.pid)" 2>/dev/null || true
    IPTABLES=$(cat /run/flavour) python3 shutdown.py drain "$1"
}

# remove_rules: in a container of its own, after the balancer has ended.
remove_rules() {
    choose_flavour
    exec python3 shutdown.py remove
}

case "${1:-serve}" in
    rules) python3 first_rules.py nat && python3 first_rules.py raw ;;
    check) python3 kernel_check.py ;;
    alive) alive ;;
    serve) serve ;;
    drain) drain "$2" ;;
    remove) remove_rules ;;
    *) echo "script.sh: unknown command '$1'; serve, rules, check, alive, drain SECONDS or remove" >&2; exit 2 ;;
esac
