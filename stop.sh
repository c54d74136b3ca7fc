#!/usr/bin/env bash
# Lets the connections in hand finish, then removes all of this project, and only that.
#   ./stop.sh [--project NAME] [--now] [--images] [--engine]
#     --now      do not wait for connections in hand
#     --images   remove the images made by run.sh too
#     --engine   stop the Docker Engine too, if run.sh started it
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=manager/host.sh
. manager/host.sh
# shellcheck source=manager/swarm.sh
. manager/swarm.sh

open_streams
LB_PROJECT=${LB_PROJECT:-lbscaler}
DRAIN=30 IMAGES='' ENGINE='' NETWORK_KEPT=''

main() {
    read_flags "$@"
    RUN=run/$LB_PROJECT
    mkdir -p "$RUN"
    LOG=$RUN/stop.log
    : >"$LOG"
    trap end_step EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    trap : PIPE # see say
    exec 9>"$RUN/lock"
    flock -n 9 || die "another run.sh or stop.sh of project $LB_PROJECT is at work"

    remove_manager
    remove_host_rules
    if have docker && engine_answers; then
        ! is_worker || die "this node is a worker of a Swarm; run stop.sh on a manager of it"
        if [ -n "$(our_services balancer)$(our_services backend)" ]; then remove_services; else drain; fi
        ! gives_orders || forget_in_swarm
        remove_containers
        remove_network
        [ -z "$IMAGES" ] || remove_images
    else
        say "No Docker Engine answers: its containers, if there are any, are left for a second ./stop.sh"
    fi
    check_nothing_is_left
    forget_files
    [ -z "$ENGINE" ] || step "Stopping the Docker Engine, if run.sh started it" stop_engine
    say "Project $LB_PROJECT is down; its log stays in $RUN/manager.log"
}

read_flags() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --project) LB_PROJECT=${2:?--project needs a name}; shift ;;
            --project=*) LB_PROJECT=${1#*=} ;;
            --now) DRAIN=0 ;;
            --images) IMAGES=1 ;;
            --engine) ENGINE=1 ;;
            -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
            *) echo "stop.sh: unknown word '$1'; see ./stop.sh --help" >&2; exit 2 ;;
        esac
        shift
    done
    if ! [[ "$LB_PROJECT" =~ ^[a-z0-9][a-z0-9_-]{0,39}$ ]]; then
        echo "stop.sh: --project is '$LB_PROJECT'; allowed: a-z 0-9 _ -, 40 at most" >&2
        exit 2
    fi
}

# First, so that nobody replaces what goes.
remove_manager() {
    if manager_runs || supervisor_runs; then
        step "Stopping the manager" end_manager
    fi
}

remove_host_rules() {
    local rule words
    if [ "$(id -u)" -ne 0 ] || ! have iptables-save; then return 0; fi
    while read -r rule; do
        read -ra words <<<"${rule//\"/}"
        iptables -w -t raw "${words[@]/#-A/-D}" || continue
        say "Removed the host's rule for $LB_PROJECT"
    done < <(iptables-save -t raw 2>/dev/null | grep -E "^-A .*lbscaler.project=$LB_PROJECT\"? ")
}

drain() {
    local stored balancer
    balancer=$(docker ps -q --filter "label=lbscaler.project=$LB_PROJECT" --filter label=lbscaler.role=balancer)
    [ -n "$balancer" ] && [ "$DRAIN" -ne 0 ] || return 0
    stored=$(sed -n 's/.*"LB_DRAIN_TIMEOUT": "\([0-9]*\).*/\1/p' "$RUN/settings.json" 2>/dev/null || true)
    step "Letting connections in hand finish, ${stored:-$DRAIN} s at most" drain_balancer "$balancer" "${stored:-$DRAIN}"
}

# A sick balancer has nothing in hand, and is no reason to leave anything behind.
drain_balancer() {
    timeout $(($2 + 10)) docker exec "$1" /bin/bash /balancer/script.sh drain "$2" || echo "the balancer did not drain"
}

remove_containers() {
    local role ids
    remove_check
    for role in balancer backend; do
        mapfile -t ids < <(ours "$role")
        [ ${#ids[@]} -eq 0 ] || step "Removing $role containers: ${#ids[@]}" remove "${ids[@]}"
    done
}

remove() { docker stop -t 10 "$@" || true; docker rm -f -v "$@"; }

remove_network() {
    local network foreign
    network=$(docker network ls -q --filter "label=lbscaler.project=$LB_PROJECT" --filter label=lbscaler.role=network)
    [ -n "$network" ] || return 0
    # In a Swarm its own tasks may still be attached, on other nodes, too; there the engine says when it is free.
    foreign=$(docker network inspect "$network" --format '{{if ne .Driver "overlay"}}{{range .Containers}}{{.Name}} {{end}}{{end}}')
    if [ -n "${foreign// /}" ]; then
        say "Keeping the network $LB_PROJECT: ${foreign% } is attached to it"
        NETWORK_KEPT=1
        return 0
    fi
    step "Removing the network $LB_PROJECT" remove_when_free "$network"
}

# In a Swarm, other nodes' tasks hold on to it until they have ended.
remove_when_free() {
    local tries
    for ((tries = 0; tries < 120; tries++)); do
        if docker network rm "$1"; then return 0; fi
        sleep 0.5
    done
    return 1
}

# Processes, containers and networks of this project, whoever started them meanwhile. A network of a Swarm is listed
# for a moment after its removal.
check_nothing_is_left() {
    local tries left=() names
    for ((tries = 0; tries < 20; tries++)); do
        find_what_is_left
        [ ${#left[@]} -gt 0 ] || return 0
        sleep 0.5
    done
    names=$(printf '%s, ' "${left[@]}")
    die "project $LB_PROJECT is not down, left: ${names%, }; run ./stop.sh again"
}

# Sets `left` of the function that calls it.
find_what_is_left() {
    local program pids network
    left=()
    for program in "$SUPERVISOR" "$MANAGER"; do
        mapfile -t pids < <(our_processes "$program")
        left+=("${pids[@]/#/process }")
    done
    if have docker && engine_answers; then
        mapfile -t -O ${#left[@]} left < <(
            docker service ls --filter "label=lbscaler.project=$LB_PROJECT" --format 'service {{.Name}}' 2>/dev/null || true
            docker secret ls --filter "label=lbscaler.project=$LB_PROJECT" --format 'secret {{.Name}}' 2>/dev/null || true
            docker ps -a --filter "label=lbscaler.project=$LB_PROJECT" --format 'container {{.Names}}'
        )
        network=$(docker network ls --filter "label=lbscaler.project=$LB_PROJECT" --format 'network {{.Name}}')
        [ -z "$network" ] || [ -n "$NETWORK_KEPT" ] || left+=("$network")
    fi
}

our_images() { docker image ls -q --filter label=lbscaler.image | sort -u; }

# More than once, for what is built on another has to go before it.
remove_images() {
    local pass
    for pass in 1 2 3; do
        echo "removing images, pass $pass" >>"$LOG"
        our_images | xargs -r docker image rm -f >>"$LOG" 2>&1 || true
    done
    if [ -z "$(our_images)" ]; then
        say "Removed the images made by run.sh"
    else
        say "Keeping images that are in use: $(our_images | tr '\n' ' ')"
    fi
}

forget_files() {
    local link
    for link in balancer/hostip.txt balancer/ip.txt; do
        [ "$(readlink "$link" 2>/dev/null)" != "../$RUN/balancer/${link##*/}" ] || rm -f "$link"
    done
    [ ! -e "$RUN/balancer/trace.csv" ] || mv "$RUN/balancer/trace.csv" "$RUN/trace.csv"
    rm -rf "$RUN/balancer" "$RUN/token" "$RUN"/*.pem "$RUN/settings.json" "$RUN"/*.new "$RUN"/*.pid "$RUN/manager.sock"
}

main "$@"
