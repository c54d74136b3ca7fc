#!/usr/bin/env bash
# Runs the tests that need an engine on a second host: another Debian suite, with its Docker Engine and its Python.
#   sudo tests/engines/run.sh [--suite SUITE] [PYTEST WORD…]
# SUITE is trixie without the flag. The words go to tests/run.sh there; without words they are tests/e2e tests/swarm.
# What is tested is the checkout's last commit, without changes that are not committed.
# The second host is a tree of files made by debootstrap, and namespaces for mounts, processes and the network. The tree
# stays in ${LBTEST_HOSTS:-/var/tmp/lbscaler-hosts}/SUITE for later runs; delete it to get newer packages. All else is
# removed at the end, also by Ctrl-C: processes, namespaces, the link to this host, and the rules that forward for it.
# The host's own engine is not used. One second host runs at a time.
# Exit codes: 0 passed, 1 a test or the second host failed, 2 bad use, 130 and 143 interrupted; others are pytest's.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=manager/host.sh
. manager/host.sh

# The packages that make the tree; tests/run.sh installs there what else the tests need.
PACKAGES=ca-certificates,python3,python3-venv,git,curl,iptables,iproute2,procps,debootstrap
NAME=lbengines # of the network namespace, and the comment of the rules
LINK=${NAME}0
HOST_ADDRESS=198.19.255.1 GUEST_ADDRESS=198.19.255.2
STOP_SECONDS=60 # for the second host to end its engine; then it is killed
FORWARDING=/proc/sys/net/ipv4/ip_forward
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# make_tree: installs the suite into TREE. In a mount namespace, so that an interrupted debootstrap leaves no mounts.
make_tree() {
    local new=$TREE.new script=$SUITE
    # An older debootstrap does not know the names of newer suites. It makes all recent ones as it makes sid.
    [ -e "/usr/share/debootstrap/scripts/$SUITE" ] || script=sid
    rm -rf --one-file-system "$new" || return
    unshare --mount debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$new" '' "$script" || return
    # A package that brings a daemon must not start it.
    install -m 755 /dev/stdin "$new/usr/sbin/policy-rc.d" <<<$'#!/bin/sh\nexit 101' || return
    copy_host_settings "$new" || return
    chroot "$new" update-ca-certificates || return
    chroot "$new" apt-get update || return
    install_in "$new" docker.io || return
    [ -e "$new/usr/bin/docker" ] || install_in "$new" docker-cli || return # a package of its own in newer suites only
    mv -T "$new" "$TREE"
}

# install_in TREE PACKAGE: with /proc, without which some packages' scripts fail.
install_in() {
    DEBIAN_FRONTEND=noninteractive unshare --pid --fork --mount-proc="$1/proc" \
        chroot "$1" apt-get install -y --no-install-recommends "$2"
}

# copy_host_settings TREE: what apt, pip and the resolver need to reach their servers as they do on this host.
copy_host_settings() {
    local path resolver=/etc/resolv.conf
    # With systemd, the usual file may name a resolver on the loopback interface, which the second host does not have.
    [ ! -e /run/systemd/resolve/resolv.conf ] || resolver=/run/systemd/resolve/resolv.conf
    rm -f "$1/etc/resolv.conf"
    cp -L "$resolver" "$1/etc/resolv.conf" || return
    for path in /etc/pip.conf /etc/apt/apt.conf.d /etc/apt/auth.conf.d /usr/local/share/ca-certificates; do
        [ ! -e "$path" ] || cp -rL "$path" "$1${path%/*}/" || return
    done
}

# copy_checkout: puts the last commit into TREE. Through a bundle, because git refuses to read another user's repository.
copy_checkout() {
    local git=(chroot "$TREE" git -C /root/lbscaler)
    git -c safe.directory="$PWD" bundle create "$TREE/root/head.bundle" HEAD || return
    chroot "$TREE" git init -q /root/lbscaler || return
    "${git[@]}" fetch -q /root/head.bundle HEAD || return
    "${git[@]}" checkout -qf FETCH_HEAD || return
    "${git[@]}" clean -qfdx -e /.venv -e /.venv-tests
}

# forward ACTION: inserts (-I) or deletes (-D) the rules that let the second host's packets out, and answers in.
forward() {
    local mark=(-m comment --comment "$NAME")
    iptables -w -t nat "$1" POSTROUTING -s "$GUEST_ADDRESS" ! -o "$LINK" "${mark[@]}" -j MASQUERADE
    iptables -w "$1" FORWARD -i "$LINK" "${mark[@]}" -j ACCEPT
    iptables -w "$1" FORWARD -o "$LINK" "${mark[@]}" -j ACCEPT
}

make_network() {
    remove_network # of a run that was killed
    ip netns add "$NAME"
    ip link add "$LINK" type veth peer name eth0 netns "$NAME"
    ip addr add "$HOST_ADDRESS/30" dev "$LINK"
    ip link set "$LINK" up
    ip -n "$NAME" addr add "$GUEST_ADDRESS/30" dev eth0
    ip -n "$NAME" link set lo up
    ip -n "$NAME" link set eth0 up
    ip -n "$NAME" route add default via "$HOST_ADDRESS"
    FORWARDED=$(cat "$FORWARDING")
    echo 1 >"$FORWARDING"
    forward -I
}

# remove_network: each part may be missing.
remove_network() {
    forward -D 2>/dev/null || true
    ip link del "$LINK" 2>/dev/null || true
    ip netns del "$NAME" 2>/dev/null || true
    [ "$FORWARDED" != 0 ] || echo 0 >"$FORWARDING"
}

# run_tests WORD…: in a session of its own, so that Ctrl-C reaches only this script, which then ends the second host.
# Without --default-signal, Python would ignore interrupts as a script's background processes do. `ip netns exec` would
# replace /sys and hide the cgroups from the engine. GUEST keeps descriptor 9, and with it the lock.
run_tests() {
    local keep=() variable
    for variable in http_proxy https_proxy no_proxy LBTEST_WORKERS; do
        [ -z "${!variable:-}" ] || keep+=("$variable=${!variable}")
    done
    setsid env -i --default-signal=INT HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "${keep[@]}" \
        nsenter --net="/run/netns/$NAME" unshare --mount --pid --fork --kill-child \
        bash tests/engines/first_process.sh "$TREE" "$@" </dev/null &
    GUEST=$!
    wait "$GUEST"
}

# remove_host: ends the second host's processes, then removes its network.
remove_host() {
    local tries
    trap '' INT TERM
    end_step
    if [ -n "$GUEST" ] && kill -TERM -- "-$GUEST" 2>/dev/null; then
        for ((tries = 0; tries < STOP_SECONDS * 10; tries++)); do
            kill -0 "$GUEST" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$GUEST" 2>/dev/null || true # and with it, by --kill-child, all others
    fi
    remove_network
}

SUITE=trixie
if [ "${1:-}" = --suite ]; then
    SUITE=${2:-}
    shift $(($# < 2 ? 1 : 2))
fi
[[ $SUITE =~ ^[a-z][a-z0-9-]*$ && ${1:-} != --help ]] || usage
[ $# -gt 0 ] || set -- tests/e2e tests/swarm
[ "$(id -u)" -eq 0 ] || die "a second host needs root; run it with sudo"

HOSTS=${LBTEST_HOSTS:-/var/tmp/lbscaler-hosts}
TREE=$HOSTS/$SUITE
mkdir -p run "$HOSTS"
LOG=$PWD/run/engines.log
: >"$LOG"
exec 9>"$HOSTS/lock"
flock -n 9 || die "another second host runs: $HOSTS/lock is locked"
GUEST='' FORWARDED=''
trap remove_host EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for pair in debootstrap:debootstrap ip:iproute2 iptables:iptables git:git nsenter:util-linux; do
    have "${pair%%:*}" || need "the second host" "${pair#*:}"
done
[ -e "$KEYS" ] || need "the second host" debian-archive-keyring
[ -d "$TREE" ] || step "Installing Debian $SUITE into $TREE" make_tree
step "Copying the last commit into it" copy_checkout
copy_host_settings "$TREE"
make_network
versions=$(chroot "$TREE" sh -c 'dockerd --version; python3 --version; iptables --version' | paste -sd ';' | sed 's/;/; /g')
say "On Debian $SUITE: $versions"
status=0
run_tests "$@" || status=$?
[ "$status" -eq 0 ] || { say "failed with status $status on Debian $SUITE: $versions"; exit "$status"; }
say "passed on Debian $SUITE: $versions"
