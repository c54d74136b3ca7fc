#!/bin/bash
# The balancer container's first process. Installs the first NAT rules from ip.txt, then keeps the client running:
# traffic flows before Python does, and goes on while the client is away (a container whose first process were the
# client would lose its rules and every flow with it).
#   script.sh         serve                      script.sh rules           print the first rules
#   script.sh check   what the kernel lacks      script.sh alive           Docker's health check
#   script.sh drain SECONDS   accept no new connection, wait until the open ones end
set -euo pipefail
cd "$(dirname "$0")"

# Equal shares for the addresses in ip.txt, spelled as in ruleset.py, which takes these chains over as they are.
first_rules() {
    awk -v port="${LB_BACKEND_PORT:-8000}" -v inside="${LB_BACKEND_SUBNET:+-s $LB_BACKEND_SUBNET }" '
        NF { ip[++n] = $1 }
        END {
            print "*nat"
            print ":LB-DISPATCH - [0:0]"
            for (i = 1; i <= n; i++) print ":LB-B-" ip[i] " - [0:0]"
            print ":LB-MASQ - [0:0]"
            for (i = 1; i < n; i++)
                printf "-A LB-DISPATCH -m statistic --mode random --probability %.11f -j LB-B-%s\n", 1 / (n - i + 1), ip[i]
            if (n) print "-A LB-DISPATCH -j LB-B-" ip[n]
            for (i = 1; i <= n; i++)
                print "-A LB-B-" ip[i] " -p tcp -j DNAT --to-destination " ip[i] ":" port
            print "-A LB-MASQ " inside "-p tcp -m conntrack --ctstate DNAT --ctorigdstport 8000 -j MASQUERADE --to-ports 1024-59999 --random-fully"
            print "-I PREROUTING 1 -p tcp -m tcp --dport 8000 -m addrtype --dst-type LOCAL -j LB-DISPATCH"
            print "-I POSTROUTING 1 -j LB-MASQ"
            print "COMMIT"
        }' "$([ -e ip.txt ] && echo ip.txt || echo /dev/null)" # in a Swarm the client brings the first addresses
}

# Keeps the balancer's own connections out of the connection table. A kernel that lacks it still serves.
RAW_RULES='*raw
:LB-OWN-IN - [0:0]
:LB-OWN-OUT - [0:0]
-A LB-OWN-IN ! -i lo -p tcp -m tcp --dport 60000:65535 -m addrtype --dst-type LOCAL -j CT --notrack
-A LB-OWN-OUT ! -o lo -p tcp -m tcp --sport 60000:65535 -j CT --notrack
-I PREROUTING 1 -j LB-OWN-IN
-I OUTPUT 1 -j LB-OWN-OUT
COMMIT'

# What the rules need of the kernel, one try each in a chain of its own; FEATURE|TABLE|RULE|WHAT IS LOST WITHOUT IT.
NEEDS='statistic|nat|-m statistic --mode random --probability 0.5|nothing is balanced
addrtype|nat|-m addrtype --dst-type LOCAL|the service cannot be told from other traffic
conntrack|nat|-p tcp -m conntrack --ctstate DNAT --ctorigdstport 8000|answers do not find the way back
DNAT|nat|-p tcp -j DNAT --to-destination 127.0.0.1:8000|no connection reaches a backend
MASQUERADE|nat|-p tcp -j MASQUERADE --to-ports 1024-59999 --random-fully|answers do not find the way back
set|mangle|-m set --match-set LB-CHECK dst|packets and bytes are not counted, refusals not retried
connmark|mangle|-m connmark --mark 0x0/0x40000000 -j CONNMARK --set-xmark 0x40000000/0x40000000|weights stay equal, and only probes find a frozen backend
notrack|raw|-p tcp -j CT --notrack|probes and reports need room in the connection table
connbytes|filter|-p tcp -m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply -j DROP|a refused connection is not tried elsewhere'

check() {
    local flavour feature table rule lost missing
    ipset create LB-CHECK hash:ip counters -exist || echo "missing: ipset: packets and bytes are not counted"
    for flavour in nft legacy; do
        missing=0
        while IFS='|' read -r feature table rule lost; do
            printf '*%s\n:LB-CHECK - [0:0]\n-A LB-CHECK %s\n-F LB-CHECK\n-X LB-CHECK\nCOMMIT\n' "$table" "$rule" |
                "iptables-$flavour-restore" --noflush -w 5 2>/dev/null && continue
            echo "missing in iptables-$flavour: $feature: $lost"
            missing=1
        done <<<"$NEEDS"
        [ "$missing" -eq 1 ] || { echo "iptables-$flavour has all that is needed"; return 0; }
    done
    return 1
}

alive() {
    exec 3<>/dev/tcp/127.0.0.1/5000
    printf 'GET /sync HTTP/1.0\r\n\r\n' >&3
    head -n 1 <&3 | grep -q ' 200 '
}

install_first_rules() {
    local rules
    rules=$(first_rules)
    for IPTABLES in nft legacy; do
        "iptables-$IPTABLES-restore" --noflush -w 5 <<<"$rules" || continue
        "iptables-$IPTABLES-restore" --noflush -w 5 <<<"$RAW_RULES" || echo "script.sh: no rules in the raw table" >&2
        export IPTABLES
        return
    done
    echo "script.sh: neither flavour of iptables takes the first rules; is NET_ADMIN there?" >&2
    return 1
}

serve() {
    trap 'leave' TERM INT
    install_first_rules
    echo "$IPTABLES" >/run/flavour
    while [ ! -e /run/draining ]; do
        python3 synchronization_client.py &
        echo $! >/run/client.pid
        wait $! || echo "script.sh: the client ended with status $?; starting it again" >&2
        sleep 0.5 &
        wait $!
    done
    sleep infinity &
    wait $!
}

# In a Swarm it is Swarm that stops the balancer, and nothing else lets the open connections finish.
leave() {
    [ -z "${LB_LEAVE:-}" ] || drain "$LB_LEAVE"
    exit 0
}

# For stop.sh, whose manager is gone already: no new connection is accepted, the open ones may finish.
drain() {
    local iptables tries live
    iptables=iptables-$(cat /run/flavour)
    touch /run/draining
    kill -TERM "$(cat /run/client.pid)" 2>/dev/null || true
    "$iptables" -w 5 -t nat -F LB-DISPATCH
    "$iptables" -w 5 -F LB-INPUT 2>/dev/null || true
    for ((tries = 0; tries < $1 * 5; tries++)); do
        live=$(conntrack -L -p tcp --dst-nat 2>/dev/null | grep -cvE ' (TIME_WAIT|CLOSE|LAST_ACK) ') || true
        [ "$live" -gt 0 ] || return 0
        sleep 0.2
    done
    echo "connections still open after $1 s: $live"
}

case "${1:-serve}" in
    rules) first_rules && echo "$RAW_RULES" ;;
    check) check ;;
    alive) alive ;;
    serve) serve ;;
    drain) drain "$2" ;;
    *) echo "script.sh: unknown word '$1'; serve, rules, check, alive or drain SECONDS" >&2; exit 2 ;;
esac
