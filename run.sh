#!/usr/bin/env bash
# Brings the whole system up with one command, or applies changed settings to the one that runs.
# ./run.sh --help lists the settings; each step is said before it happens, and undone when a later one fails.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh
# shellcheck source=manager/swarm.sh
. manager/swarm.sh

UNDO=()  # commands that undo what this run began, latest first

main() {
    LOG=run/run.log
    trap 'roll_back $?' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    case " $* " in *" --no-install "*) NO_INSTALL=1 ;; esac
    have python3 || { mkdir -p run && need "reading the settings" python3 python3-venv; }
    read_settings "$@"
    RUN=run/$LB_PROJECT
    case "$ACTION" in
        *doctor*) view python3 manager/doctor.py ;;
        ?*)
            [ -x .venv/bin/python ] || die "project $LB_PROJECT does not run here; ./run.sh starts it"
            view .venv/bin/python manager/watch.py
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
    [ -n "$(ours balancer)" ] || step "Checking that this kernel has what the rules need" check_kernel
    make_venv
    make_network
    swarm || spare_the_host
    ! swarm || share_secrets
    start_manager
    start_balancer
    wait_until_it_serves
    UNDO=()
    (umask 077 && what_runs >"$RUN/settings.json.new" && mv "$RUN/settings.json.new" "$RUN/settings.json")
    summary
    exec 9>&-
    [ -z "$FOLLOW" ] || exec tail -n 20 -F "$RUN/manager.log"
}

swarm() { [ "$LB_ORCHESTRATOR" = swarm ]; }

read_settings() {
    local word settings
    for word in "$@"; do
        case "$word" in -h | --help) UNDO=(); exec python3 manager/settings.py --help ;; esac
    done
    settings=$(python3 manager/settings.py "$@") || exit $?
    set -a
    eval "$settings"
    set +a
}

# view PROGRAM…: one that shows how things are and changes nothing.
view() {
    local word
    for word in $ACTION; do set -- "$@" "--$word"; done
    exec "$@"
}

roll_back() {
    local status=$1 undo
    trap : INT TERM
    trap - EXIT
    end_step
    [ "$status" -eq 0 ] || [ ${#UNDO[@]} -eq 0 ] || say "Undoing what this run began"
    [ "$status" -eq 0 ] || for undo in "${UNDO[@]}"; do "$undo" >>"$LOG" 2>&1 || say "  could not: $undo (see $LOG)"; done
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
    [ ${#ports[@]} -eq 0 ] || python3 manager/preflight.py ports "${ports[@]}" || exit 1
}

# unchanged SETTING: whether the running project has the value it is to have.
unchanged() { grep -qsF "\"$1\": \"${!1}\"" "$RUN/settings.json"; }

manager_address() { if swarm; then echo "$MANAGER_ADDRESS"; else network_gateway; fi; }

network_gateway() {
    docker network inspect "$LB_PROJECT" --format '{{(index .IPAM.Config 0).Gateway}}' 2>/dev/null
}

# -- images, then the manager, then the balancer --------------------------------------------------------------------

build_images() {
    BALANCER_IMAGE=lbscaler-balancer:$(digest balancer)
    build_image balancer "$BALANCER_IMAGE"
    BACKEND_IMAGE=${LB_IMAGE:-lbscaler-server:$(digest server)}
    if [ -z "$LB_IMAGE" ]; then
        build_image server "$BACKEND_IMAGE"
    elif ! docker image inspect "$LB_IMAGE" >/dev/null 2>&1; then
        step "Pulling $LB_IMAGE" docker pull "$LB_IMAGE"
    fi
    BACKEND_ID=$(docker image inspect --format '{{.Id}}' "$BACKEND_IMAGE") # a tag may come to mean another image
}

make_venv() {
    local stamp
    stamp=$(sha256sum <manager/requirements.txt)
    if [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then return; fi
    python3 -c 'import ensurepip, venv' 2>/dev/null || need "the manager's environment" python3-venv
    step "Installing the manager's packages into .venv" install_packages
    echo "$stamp" >.venv/stamp
}

install_packages() {
    python3 -m venv --clear .venv
    .venv/bin/python -m pip install --require-hashes --only-binary :all: -r manager/requirements.txt
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
    local subnet=$LB_SUBNET taken kind=()
    if [ -z "$subnet" ]; then
        mapfile -t taken < <(docker network ls -q | xargs docker network inspect --format '{{json .IPAM.Config}}' |
            grep -oE '"Subnet":"[0-9./]+"' | cut -d'"' -f4)
        subnet=$(python3 manager/preflight.py subnet "${taken[@]}")
    fi
    ! swarm || kind=(--driver overlay --attachable)
    step "Creating the network $LB_PROJECT, $subnet" docker network create "${kind[@]}" --subnet "$subnet" --gateway "$(first_of "$subnet")" \
        --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=network "$LB_PROJECT"
}

network_subnet() { docker network inspect "$LB_PROJECT" --format '{{(index .IPAM.Config 0).Subnet}}'; }

first_of() {
    local a b c d
    IFS=. read -r a b c d <<<"${1%/*}"
    echo "$a.$b.$c.$((d + 1))"
}

# Traffic between balancer and backends crosses the host's connection tracking for nothing, once each way (bridge
# netfilter); both ends inside, on our bridge, so nothing Docker does for published ports or isolation is touched.
spare_the_host() {
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
    local settings
    settings=$(what_runs)
    if manager_runs && supervisor_runs && [ "$settings" = "$(cat "$RUN/settings.json" 2>/dev/null)" ] && [ -z "$BACKENDS" ]; then
        say "The manager is up and its settings are unchanged"
        return
    fi
    if manager_runs || supervisor_runs; then
        UNDO=(bring_back "${UNDO[@]}")
        step "Stopping the manager, to start it with changed settings" end_manager
    fi
    make_token
    printf '%s:%s\n' "$(manager_address)" "$LB_MANAGER_PORT" >"$RUN/balancer/hostip.txt"
    ln -sf "../$RUN/balancer/hostip.txt" "../$RUN/balancer/ip.txt" balancer/
    [ "$settings" = "$(cat "$RUN/settings.json" 2>/dev/null)" ] || rm -f "$RUN/balancer/orders.json"
    step "Starting the manager" launch_manager
}

# A live system whose new settings do not start goes back to those it ran with: settings.json still has them.
bring_back() {
    local unset
    mapfile -t unset < <(compgen -e LB_ | sed 's/^/--unset=/')
    end_manager
    flock -u 9
    env "${unset[@]}" ./run.sh --project "$LB_PROJECT"
}

make_token() { [ -s "$RUN/token" ] || (umask 077 && head -c 24 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$RUN/token"); }

# The settings, and what they are carried out by: after an upgrade the manager is another one.
what_runs() { python3 manager/settings.py --store "$BACKEND_ID" "$(digest manager)"; }

launch_manager() {
    local began=$SECONDS settings first=(${BACKENDS:+--backends "$BACKENDS"})
    export LB_HEALTH=${LB_HEALTH:-${LB_IMAGE:+tcp}} LB_IMAGE=$BACKEND_IMAGE
    if [ "$(id -u)" -eq 0 ] && [ -d /run/systemd/system ]; then
        mapfile -t settings < <(compgen -e | grep -E '^(LB_|DOCKER_)' | sed 's/^/--setenv=/')
        systemd-run --quiet --collect --unit "$(manager_unit)" --property Restart=on-failure \
            --property "RestartPreventExitStatus=1 2" \
            "${settings[@]}" "$PWD/manager/supervise.sh" "${first[@]}"
    else
        setsid manager/supervise.sh "${first[@]}" &
    fi
    while [ $((SECONDS - began)) -lt 10 ]; do
        if http_get 127.0.0.1 "$LB_MANAGER_PORT" /status >/dev/null; then return; fi
        sleep 0.05
        [ $((SECONDS - began)) -lt 2 ] || supervisor_runs || break
    done
    end_manager
    return 1
}

start_balancer() {
    local config running list=(ps) launch=launch_balancer what="the balancer on $LB_BIND:$LB_PORT"
    config=$(printf '%s\n' "$BALANCER_IMAGE" "$LB_BIND" "$LB_PORT" "$LB_BACKEND_PORT" "$LB_PRESERVE_CLIENT_IP" "$LB_BALANCER_CONSTRAINT" "$(cat "$RUN/token")" \
        "$(if swarm; then echo "$LB_MANAGER_PORT $LB_DRAIN_TIMEOUT"; else cat "$RUN/balancer/hostip.txt"; fi)" | sha256sum | cut -c1-12)
    ! swarm || { list=(service ls) launch=launch_balancers what="a balancer on every node, port $LB_PORT"; }
    running=$(docker "${list[@]}" -q --filter "label=lbscaler.project=$LB_PROJECT" --filter "label=lbscaler.config=$config")
    if [ -n "$running" ]; then
        say "The balancer is up and its settings are unchanged"
        return
    fi
    step "Starting $what" "$launch" "$config"
}

check_kernel() {
    docker run --rm --network none --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --tmpfs /run "$BALANCER_IMAGE" check
}

# What a balancer may do, and how its kernel is set; in a Swarm, too.
BALANCER_RIGHTS=(--cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --read-only
    --sysctl net.ipv4.ip_forward=1 --sysctl net.netfilter.nf_conntrack_acct=1
    --sysctl net.ipv4.conf.all.send_redirects=0 --sysctl net.ipv4.conf.default.send_redirects=0
    --sysctl net.netfilter.nf_conntrack_tcp_timeout_time_wait=10
    --sysctl net.netfilter.nf_conntrack_tcp_loose=0 --sysctl net.netfilter.nf_conntrack_tcp_be_liberal=1)

launch_balancer() {
    local old
    LB_TOKEN=$(cat "$RUN/token") # by name: what stands on a command line is for all to see
    export LB_TOKEN
    mapfile -t old < <(ours balancer)
    [ ${#old[@]} -eq 0 ] || docker rm -f "${old[@]}"
    docker run --detach --name "$LB_PROJECT-balancer" --network "$LB_PROJECT" --publish "$LB_BIND:$LB_PORT:8000" \
        --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=balancer --label "lbscaler.config=$1" \
        --restart always "${BALANCER_RIGHTS[@]}" --tmpfs /run \
        --security-opt no-new-privileges --memory 512m --pids-limit 256 \
        --env LB_TOKEN --env "LB_BACKEND_PORT=$LB_BACKEND_PORT" \
        --env "LB_INSIDE=${LB_PRESERVE_CLIENT_IP:+$(network_subnet)}" \
        --volume "$PWD/$RUN/balancer:/balancer/run:ro" "$BALANCER_IMAGE"
}

wait_until_it_serves() {
    step "Waiting for the first answer on port $LB_PORT" first_answer
}

# A connection that finds nobody ready is held, not refused, so ask the manager first: it knows when all are, and one
# has to be.
first_answer() {
    local address=$LB_BIND began=$SECONDS status
    [ "$address" != 0.0.0.0 ] || address=127.0.0.1
    while [ $((SECONDS - began)) -lt 60 ]; do
        status=$(http_get 127.0.0.1 "$LB_MANAGER_PORT" /status || true)
        if [[ "$status" == *'"state":"active"'* ]] &&
            [[ "$status" != *'"state":"starting"'* || $((SECONDS - began)) -gt 15 ]] &&
            { [ -n "$LB_IMAGE" ] || swarm || http_get "$address" "$LB_PORT" /; }; then return; fi
        # Launches in vain, one after the other, do not get better by waiting.
        if [[ "$status" =~ \"failed\":([0-9]+) && "${BASH_REMATCH[1]}" -ge 4 && "$status" != *'"state":"active"'* ]]; then break; fi
        sleep 0.1
    done
    if swarm; then
        docker service ps --no-trunc --format '{{.Name}} on {{.Node}}: {{.CurrentState}} {{.Error}}' "$LB_PROJECT-balancer" || true
    else
        docker logs --tail 5 "$LB_PROJECT-balancer" || true
    fi
    grep "last words" "$RUN/manager.log" | tail -n 3 || true
    .venv/bin/python manager/watch.py --status || true
    echo "No backend got ready; see --backend-port, --health and --allow in ./run.sh --help"
    return 1
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
