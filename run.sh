#!/usr/bin/env bash
# Brings the whole system up with one command, or applies changed settings to the one that runs.
# ./run.sh --help lists the settings; each step is said before it happens, and undone when a later one fails.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh
# shellcheck source=manager/swarm.sh
. manager/swarm.sh

open_streams
NETWORK_TRIES=30
UNDO=()  # commands that undo what this run began, latest first

main() {
    LOG=run/run.log
    trap 'roll_back $?' EXIT
    trap 'ended_by_signal 130' INT
    trap 'ended_by_signal 143' TERM
    trap 'nobody_reads; ended_by_signal 129' HUP
    trap : PIPE # see say
    case " $* " in *" --no-install "*) NO_INSTALL=1 ;; esac
    have python3 || { mkdir -p run && need "reading the settings" python3 python3-venv; }
    read_settings "$@"
    RUN=run/$LB_PROJECT
    case "$ACTION" in
        *doctor*) view python3 cli.doctor ;;
        ?*)
            [ -x .venv/bin/python ] || does_not_run
            view .venv/bin/python cli.watch
            ;;
    esac

    mkdir -p "$RUN/balancer"
    LOG=$RUN/run.log
    exec 9>"$RUN/lock"
    flock -n 9 || die "another run.sh or stop.sh of project $LB_PROJECT is at work"
    : >"$LOG"

    [ -e "$ENGINE_DIR/dockerd.pid" ] || UNDO=(stop_engine) # for a start that is interrupted
    ensure_engine
    UNDO=()
    [ -z "$ENGINE_STARTED" ] || UNDO=(stop_engine)
    ! swarm || join_swarm
    check_host
    build_images
    ! swarm || publish_images
    [ -n "$(ours balancer)" ] || check_kernel
    make_venv
    make_network
    swarm || skip_host_tracking
    ! swarm || share_secrets
    start_manager
    wait_until_it_serves
    # Before the start counts as a success: without its settings, the next run.sh would take this project for another.
    printf '%s\n' "$SNAPSHOT" | program python3 core.settings --store "$RUN/settings.json" || exit 1
    UNDO=()
    rm -f "$RUN/balancer/orders.before"
    summary
    exec 9>&-
    [ -z "$FOLLOW" ] || exec tail -n 20 -F "$RUN/manager.log"
}

swarm() { [ "$LB_ORCHESTRATOR" = swarm ]; }

read_settings() {
    local word settings
    for word in "$@"; do
        case "$word" in -h | --help) UNDO=(); program python3 core.settings --help; exit 0 ;; esac
    done
    settings=$(program python3 core.settings "$@") || exit $?
    set -a
    eval "$settings"
    set +a
}

does_not_run() {
    local problem="it does not run here; ./run.sh starts it"
    if [[ " $ACTION " == *" json "* ]]; then
        printf '{"project": "%s", "state": "down", "problem": "%s"}\n' "$LB_PROJECT" "$problem"
        exit 1
    fi
    die "project $LB_PROJECT does not run here; ./run.sh starts it"
}

# view PYTHON MODULE: a program that shows how things are and changes nothing.
view() {
    local word
    for word in $ACTION; do set -- "$@" "--$word"; done
    exec env PYTHONPATH=manager "$1" -m "${@:2}"
}

# The terminal is closed: what is left to print goes to the log.
nobody_reads() { exec >>"$LOG" 2>&1 </dev/null || exec >/dev/null 2>&1 </dev/null; }

# The undo runs to its end: a second Ctrl-C would leave half a system.
outlast_signals() { trap : INT TERM HUP; }

ended_by_signal() { outlast_signals && exit "$1"; }

# Beware of `return` without a status in what it calls: in a trap that is the status before the trap.
roll_back() {
    local status=$1 undo
    outlast_signals
    trap - EXIT
    end_step
    if [ "$status" -ne 0 ] && [ ${#UNDO[@]} -gt 0 ]; then
        say "Undoing what this run began"
        for undo in "${UNDO[@]}"; do shielded "$undo" || say "  could not: $undo (see $LOG)"; done
    fi
    exit "$status"
}

# -- before anything starts -----------------------------------------------------------------------------------------

check_host() {
    local gateway ports=()
    docker info --format '{{.SecurityOptions}}' | grep -q rootless && die "a rootless engine has no bridge on this host; use a rootful one"
    gateway=$(manager_address) || gateway=127.0.0.1
    [ -n "$(ours balancer)" ] && { swarm || { unchanged LB_PORT && unchanged LB_BIND; }; } || ports+=("$LB_BIND:$LB_PORT:--port")
    manager_runs && unchanged LB_MANAGER_PORT ||
        ports+=("127.0.0.1:$LB_MANAGER_PORT:--manager-port" "$gateway:$LB_MANAGER_PORT:--manager-port")
    [ ${#ports[@]} -eq 0 ] || program python3 cli.host_checks ports "${ports[@]}" || exit 1
}

# unchanged SETTING: whether the running project has the value it is to have, as far as its files tell.
unchanged() { [ ! -e "$RUN/settings.json" ] || grep -qsF "\"$1\": \"${!1}\"" "$RUN/settings.json"; }

manager_address() { if swarm; then echo "$MANAGER_ADDRESS"; else network_gateway; fi; }

network_gateway() {
    docker network inspect "$LB_PROJECT" --format '{{(index .IPAM.Config 0).Gateway}}' 2>/dev/null
}

# -- images, the network, the manager --------------------------------------------------------------------------------

build_images() {
    BALANCER_IMAGE=lbscaler-balancer:$(digest balancer)
    build_image balancer "$BALANCER_IMAGE"
    BACKEND_IMAGE=${LB_IMAGE:-lbscaler-server:$(digest server)}
    if [ -n "${GO_BACK_TO:-}" ]; then # see bring_back
        BACKEND_IMAGE=$GO_BACK_TO
    elif [ -z "$LB_IMAGE" ]; then
        build_image server "$BACKEND_IMAGE"
    elif ! docker image inspect "$LB_IMAGE" >/dev/null 2>&1; then
        step "Pulling $LB_IMAGE" docker pull "$LB_IMAGE"
    fi
    BACKEND_ID=$(docker image inspect --format '{{.Id}}' "$BACKEND_IMAGE") # a tag may come to mean another image
}

# check_kernel: a balancer that only tries its rules, in a namespace of its own; what is left of it goes in any case.
check_kernel() {
    UNDO=(remove_check "${UNDO[@]}")
    step "Checking that this kernel has what the rules need" docker run --rm \
        --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=check \
        --network none --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --tmpfs /run "$BALANCER_IMAGE" check
    UNDO=("${UNDO[@]:1}")
}

# make_venv: projects share .venv, and their managers run from it.
make_venv() {
    local stamp
    stamp=$(sha256sum <manager/requirements.txt)
    if [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then return; fi
    python3 -c 'import ensurepip, venv' 2>/dev/null || need "the manager's environment" python3-venv
    exec 8>run/venv.lock
    flock -n 8 || { say "Waiting for another run.sh, which installs the manager's packages" && flock 8; }
    [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ] ||
        step "Installing the manager's packages into .venv" install_packages "$stamp"
    exec 8>&-
}

# install_packages STAMP: beside the environment that runs, which is replaced only when the new one is complete.
install_packages() {
    [ -e .venv ] || [ ! -e .venv.old ] || mv .venv.old .venv # a switch that was cut off
    rm -rf .venv.new .venv.old
    python3 -m venv .venv.new || return
    .venv.new/bin/python -m pip install --require-hashes --only-binary :all: -r manager/requirements.txt || return
    echo "$1" >.venv.new/stamp || return
    [ ! -e .venv ] || mv -T .venv .venv.old
    mv -T .venv.new .venv && rm -rf .venv.old
}

make_network() {
    if [ -z "$(ours balancer)$(ours backend)$(our_services balancer)$(our_services backend)" ] && ! manager_runs; then UNDO=(take_down "${UNDO[@]}"); fi
    if network_gateway >/dev/null; then
        [ -n "$(docker network ls -q --filter "label=lbscaler.project=$LB_PROJECT" --filter "name=^$LB_PROJECT\$")" ] ||
            die "a network $LB_PROJECT is there and not ours; choose another name with --project"
        [ -z "$LB_SUBNET" ] || [ "$LB_SUBNET" = "$(network_subnet)" ] ||
            die "the network $LB_PROJECT is $(network_subnet); ./stop.sh first to have it be --subnet $LB_SUBNET"
        return
    fi
    step "Creating the network $LB_PROJECT${LB_SUBNET:+, $LB_SUBNET}" create_network
}

# create_network: where another start takes the same subnet first, the next one is tried.
create_network() {
    local subnet answer tries kind=() failed=()
    ! swarm || kind=(--driver overlay --attachable)
    for ((tries = 0; tries < NETWORK_TRIES; tries++)); do
        subnet=$LB_SUBNET
        [ -n "$subnet" ] || subnet=$(free_subnet "${failed[@]}") || return
        echo "subnet $subnet"
        answer=$(docker network create "${kind[@]}" --subnet "$subnet" --gateway "$(first_of "$subnet")" \
            --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=network "$LB_PROJECT" 2>&1) && return
        echo "$answer"
        # The engine has no code of its own for this refusal.
        [ -z "$LB_SUBNET" ] && [[ "$answer" == *"Pool overlaps"* ]] || return 1
        failed+=("$subnet")
    done
    return 1
}

# free_subnet TAKEN…: one that overlaps no network of the engine's, no route of this host and none of TAKEN.
free_subnet() {
    local taken
    mapfile -t taken < <(docker network ls -q | xargs docker network inspect --format '{{json .IPAM.Config}}' |
        grep -oE '"Subnet":"[0-9./]+"' | cut -d'"' -f4)
    program python3 cli.host_checks subnet "${taken[@]}" "$@"
}

network_subnet() { docker network inspect "$LB_PROJECT" --format '{{(index .IPAM.Config 0).Subnet}}'; }

first_of() {
    local a b c d
    IFS=. read -r a b c d <<<"${1%/*}"
    echo "$a.$b.$c.$((d + 1))"
}

# Traffic between balancer and backends crosses the host's connection tracking for nothing, once each way (bridge
# netfilter); both ends inside, on our bridge, so nothing Docker does for published ports or isolation is touched.
skip_host_tracking() {
    local bridge subnet rule
    if [ "$(id -u)" -ne 0 ] || ! have iptables; then return; fi
    subnet=$(network_subnet) # not within the list below: bash cannot run a trap while it reads one
    bridge=br-$(docker network inspect "$LB_PROJECT" --format '{{.Id}}' | cut -c1-12)
    rule=(-i "$bridge" -s "$subnet" -d "$subnet" -m addrtype ! --dst-type LOCAL
        -m comment --comment "lbscaler.project=$LB_PROJECT" -j CT --notrack)
    iptables -w -t raw -C PREROUTING "${rule[@]}" 2>/dev/null || iptables -w -t raw -A PREROUTING "${rule[@]}" 2>>"$LOG" ||
        say "Without CT --notrack on the host: new connections cost a little more"
}

take_down() { flock -u 9; ./stop.sh --project "$LB_PROJECT" --now; }

start_manager() {
    SNAPSHOT=$(settings_snapshot)
    if manager_runs && supervisor_runs && unchanged_snapshot && [ -z "$BACKENDS" ]; then
        say "The manager is up and its settings are unchanged"
        return
    fi
    if manager_runs || supervisor_runs; then
        [ ! -e "$RUN/settings.json" ] || UNDO=(bring_back "${UNDO[@]}")
        step "Stopping the manager, to start it with changed settings" end_manager
    fi
    make_token
    printf '%s:%s\n' "$(manager_address)" "$LB_MANAGER_PORT" >"$RUN/balancer/hostip.txt"
    ln -sf "../$RUN/balancer/hostip.txt" "../$RUN/balancer/ip.txt" balancer/
    unchanged_snapshot || forget_orders
    step "Starting the manager" launch_manager
}

# With other settings, the operator's orders no longer hold, and an update that was given up may be tried again.
forget_orders() {
    rm -f "$RUN/balancer/refused_update.json"
    [ ! -e "$RUN/balancer/orders.json" ] || mv -f "$RUN/balancer/orders.json" "$RUN/balancer/orders.before"
}

unchanged_snapshot() { [ "$SNAPSHOT" = "$(cat "$RUN/settings.json" 2>/dev/null)" ]; }

# A live system whose new settings do not start, or whose update is given up, goes back to those it ran with:
# settings.json still has them, and the image's id, for its name may mean the new one by now. Nothing is waited for.
bring_back() {
    local unset image
    image=$(sed -n 's/.*"backend_image": "\([^"]*\)".*/\1/p' "$RUN/settings.json")
    mapfile -t unset < <(compgen -e LB_ | sed 's/^/--unset=/')
    end_manager
    [ ! -e "$RUN/balancer/orders.before" ] || mv -f "$RUN/balancer/orders.before" "$RUN/balancer/orders.json"
    flock -u 9
    env "${unset[@]}" GO_BACK_TO="$image" ./run.sh --project "$LB_PROJECT" --no-wait
}

make_token() {
    [ -s "$RUN/token" ] || (umask 077 && head -c 24 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$RUN/token.new" &&
        mv "$RUN/token.new" "$RUN/token")
}

# The settings, the images, the manager's own code and certificate: after an upgrade the manager is another one.
settings_snapshot() {
    local code
    code=$(digest manager)
    code+=${LB_CERTIFICATE_SECRET:+ $LB_CERTIFICATE_SECRET}
    program python3 core.settings --print "$BACKEND_ID" "$BALANCER_IMAGE" "$code"
}

launch_manager() {
    local began=$SECONDS settings first=(--project "$LB_PROJECT" ${BACKENDS:+--backends "$BACKENDS"})
    export LB_BALANCER_IMAGE
    LB_BALANCER_IMAGE=$(pinned_balancer_image)
    export LB_HEALTH=${LB_HEALTH:-${LB_IMAGE:+tcp}} LB_IMAGE=$BACKEND_IMAGE
    if [ "$(id -u)" -eq 0 ] && [ -d /run/systemd/system ]; then
        mapfile -t settings < <(compgen -e | grep -E '^(LB_|DOCKER_)' | sed 's/^/--setenv=/')
        systemd-run --quiet --collect --unit "$(manager_unit)" --property Restart=on-failure \
            --property "RestartPreventExitStatus=1 2" \
            "${settings[@]}" "$PWD/manager/supervise.sh" "${first[@]}"
    else
        setsid "$PWD/manager/supervise.sh" "${first[@]}" &
    fi
    while [ $((SECONDS - began)) -lt 10 ]; do
        if http_get 127.0.0.1 "$LB_MANAGER_PORT" /status >/dev/null; then return; fi
        sleep 0.05
        [ $((SECONDS - began)) -lt 2 ] || supervisor_runs || break
    done
    end_manager
    return 1
}

# By id where a Swarm is to pull nothing, or its engine would ask a registry for the name first.
pinned_balancer_image() {
    if swarm && [ -z "$LB_REGISTRY" ]; then
        docker image inspect --format '{{.Id}}' "$BALANCER_IMAGE"
    else
        echo "$BALANCER_IMAGE"
    fi
}

wait_until_it_serves() {
    SHOW_LOG=1 step "Waiting for the first answer on port $LB_PORT" program .venv/bin/python cli.startup serve
    [ -n "$NO_WAIT" ] ||
        SHOW_LOG=1 step "Waiting until every backend has these settings" program .venv/bin/python cli.startup update
}

summary() {
    local host=$LB_BIND
    [ "$host" != 0.0.0.0 ] || host=localhost
    say ""
    say "  service   http://$host:$LB_PORT/"
    say "  manager   http://localhost:$LB_MANAGER_PORT/"
    say "  log       tail -F '$PWD/$RUN/manager.log'"
    say "  stop      ./stop.sh$([ "$LB_PROJECT" = lbscaler ] || echo " --project $LB_PROJECT")"
}

main "$@"
