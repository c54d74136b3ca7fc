# shellcheck shell=bash
# What run.sh, stop.sh and tests/run.sh share: telling steps, and finding, starting and ending the Docker Engine.
# Sourced with the working directory at the repository's root. LOG is the file that steps write to.

ENGINE_DIR=run/engine
TICKER='' # process group of what shows that a step moves

# Where nobody reads any more what is printed, that is no reason to stop half way.
say() { printf '%s\n' "$*" 2>/dev/null || true; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# open_streams: a standard stream that is closed becomes /dev/null, or the next file that is opened would take its place.
open_streams() {
    true 9>&2 || exec 2>/dev/null
    { true 9<&0; } 2>/dev/null || exec </dev/null
    { true 9>&1; } 2>/dev/null || exec >/dev/null
}

# program PYTHON MODULE ARGUMENT…: runs one of the manager's modules.
program() { PYTHONPATH=manager "$1" -m "${@:2}"; }

# step TEXT COMMAND…: says TEXT, runs COMMAND with its output in LOG, says how long it took; shows that long ones move.
# Where it fails that is the end, but with MAY_FAIL set. SHOW_LOG: the last line of LOG is progress that anybody reads.
step() {
    local text=$1 began=${EPOCHREALTIME/[.,]/} status=0 job
    shift
    printf '%s … ' "$text" 2>/dev/null || true
    set -m
    "$@" >>"$LOG" 2>&1 </dev/null 9>&- &
    job=$!
    tick "$text" 9>&- &
    TICKER=$!
    set +m
    wait "$job" || status=$?
    end_step
    [ ! -t 1 ] || printf '\r\033[K%s … ' "$text"
    if [ "$status" -ne 0 ]; then
        say "failed"
        [ -z "${MAY_FAIL:-}" ] || return "$status"
        { echo "--- the end of $LOG:"; tail -n 15 "$LOG"; echo "--- the whole: $PWD/$LOG"; } >&2
        die "$text: failed with status $status"
    fi
    local took=$((${EPOCHREALTIME/[.,]/} - began))
    say "$((took / 1000000)).$((took / 100000 % 10)) s"
}

tick() {
    local text=$1 seconds=0 every=5
    [ ! -t 1 ] || every=1
    while sleep "$every"; do
        seconds=$((seconds + every))
        if [ -t 1 ]; then
            printf '\r\033[K%s … %d s  %.60s' "$text" "$seconds" "$(last_line)"
        elif [ -n "${SHOW_LOG:-}" ]; then
            printf '%d s: %s … ' "$seconds" "$(last_line)"
        else
            printf '%d s … ' "$seconds"
        fi
    done
}

last_line() { tail -n 1 "$LOG" | tr -cd '[:print:]'; }

# end_step: ends what step has under way, with all it started. What shows that it moves has nothing to tidy up, and goes
# at once: a job that ended just as bash was interrupted is waited for until the last of bash's children is gone. A bash
# that is told within its first millisecond forgets it, so jobs are told twice.
end_step() {
    local group groups
    groups=$(jobs -p)
    for group in $groups; do
        if [ "$group" = "$TICKER" ]; then kill -KILL -- "-$group"; else
            kill -TERM -- "-$group"
            sleep 0.05
            kill -TERM -- "-$group"
        fi
    done 2>/dev/null || true
    for group in $groups; do wait_for "$group" || true; done
    TICKER=''
}

# shielded COMMAND…: runs it to its end, whatever signals come meanwhile; its status. It has a process group of its own,
# which a terminal's Ctrl-C does not reach; the caller has to have set traps for the signals that it is to outlast.
shielded() {
    local job
    set -m
    "$@" >>"$LOG" 2>&1 </dev/null &
    job=$!
    set +m
    wait_for "$job"
}

# wait_for JOB: its status. A signal that this shell traps ends `wait`, too; then the job still runs.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" 2>/dev/null || status=$?
        if [ "$status" -le 128 ] || ! kill -0 "$1" 2>/dev/null; then return "$status"; fi
    done
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }
}

# need WHAT-FOR PACKAGE…: installs Debian's packages, after saying so; says what is missing where it may not.
need() {
    local purpose=$1
    shift
    [ -z "${NO_INSTALL:-}" ] || die "missing for $purpose: $*; install it, or leave --no-install out"
    [ "$(id -u)" -eq 0 ] || die "missing for $purpose: $*; install it, or run as root"
    have apt-get || die "missing for $purpose: $*; no apt-get here to install it with"
    step "Installing $* ($purpose)" apt_install "$@"
}

engine_answers() { timeout 10 docker info >/dev/null 2>&1; }

# ensure_engine: the engine that answers, else an installed one, started, else Debian's, installed and started.
# Returns with ENGINE_STARTED=1 when it was started here, else empty.
ensure_engine() {
    export ENGINE_STARTED=
    case "${DOCKER_HOST:-unix:}" in unix:*) ;; *) die "DOCKER_HOST is $DOCKER_HOST; the engine has to be on this host" ;; esac
    if have docker && engine_answers; then return; fi
    [ -z "${DOCKER_HOST:-}" ] || die "no engine answers at DOCKER_HOST=$DOCKER_HOST"
    if ! have dockerd; then
        need "running containers" docker.io iptables
    fi
    have docker || need "talking to the engine" docker-cli
    [ "$(id -u)" -eq 0 ] || die "no engine answers this user; start it, or join the docker group, or run as root"
    step "Starting the Docker Engine" start_engine
    ENGINE_STARTED=1
}

# start_engine [FLAG…]: flags for dockerd, where there is no systemd. A second try, for one that was just killed may
# still stand in the way of the next.
start_engine() {
    local tries
    mkdir -p "$ENGINE_DIR"
    if [ -d /run/systemd/system ] && systemctl start docker; then
        echo systemd >"$ENGINE_DIR/dockerd.pid"
        return
    fi
    for tries in 1 2 3; do
        setsid dockerd "$@" >>"$ENGINE_DIR/dockerd.log" 2>&1 </dev/null &
        echo $! >"$ENGINE_DIR/dockerd.pid"
        if wait_for_engine $!; then return; fi
        sleep "$tries"
    done
    tail -n 15 "$ENGINE_DIR/dockerd.log"
    return 1
}

wait_for_engine() {
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        if engine_answers; then return; fi
        kill -0 "$1" 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}

# stop_engine: ends the engine that start_engine began, and no other.
stop_engine() {
    local pid
    pid=$(cat "$ENGINE_DIR/dockerd.pid" 2>/dev/null) || return 0
    if [ "$pid" = systemd ]; then
        systemctl stop docker docker.socket
    elif is_process "$pid" dockerd; then
        kill -TERM "$pid"
        wait_gone "$pid" 30
    fi
    rm -rf "$ENGINE_DIR"
}

# is_process PID WORD: whether that process is there and has WORD in its command line (numbers are reused).
is_process() { [ -n "$1" ] && tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF -- "$2"; }

# wait_gone PID SECONDS: one that has ended and was not waited for yet has no command line. `kill -0` would not do: it
# fails as well for another user's process.
wait_gone() {
    local tries
    for ((tries = 0; tries < $2 * 20; tries++)); do
        [ -n "$(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline")" ] || return 0
        sleep 0.05
    done
    return 1
}

# -- the manager, under its supervisor -------------------------------------------------------------------------------

SUPERVISOR=manager/supervise.sh MANAGER=manager/script.py

manager_unit() { echo "lbscaler-$LB_PROJECT"; }
manager_runs() { [ -n "$(our_processes $MANAGER)" ]; }
supervisor_runs() { [ -n "$(our_processes $SUPERVISOR)" ]; }

# our_processes PROGRAM: ids of the processes that run this checkout's PROGRAM for this project. Their command lines say
# so: they are found without a pid file, and neither another project's nor a process with a number from before is.
our_processes() {
    local files file pid
    mapfile -t files < <(grep -lzE "(^|/)${1//./\\.}\$" /proc/[0-9]*/cmdline 2>/dev/null)
    for file in "${files[@]}"; do
        pid=${file#/proc/} pid=${pid%/cmdline}
        if runs_for_project "$pid" "$1"; then echo "$pid"; fi
    done
}

# runs_for_project PID PROGRAM: whether its command line is INTERPRETER PROGRAM --project NAME …
runs_for_project() {
    local words
    { mapfile -d '' -t words <"/proc/$1/cmdline"; } 2>/dev/null || return 1
    # By its path, or by its working directory, for the checkout may have been moved or reached through a link.
    [ "${words[1]:-}" = "$PWD/$2" ] || { [[ "/${words[1]:-}" == */"$2" ]] && [ "/proc/$1/cwd" -ef . ]; } || return 1
    if [ "${words[2]:-}" = --project ]; then
        [ "${words[3]:-}" = "$LB_PROJECT" ]
    else # it was started before an upgrade: its pid file tells
        grep -qsxF "$1" "$RUN/manager.pid" "$RUN/supervisor.pid"
    fi
}

# end_manager: the supervisor first, so that nobody starts the manager again.
end_manager() {
    [ ! -d /run/systemd/system ] || systemctl stop "$(manager_unit)" 2>/dev/null || true
    end_processes $SUPERVISOR
    end_processes $MANAGER
}

end_processes() {
    local pid
    for pid in $(our_processes "$1"); do
        kill -TERM "$pid" || true # it may have ended meanwhile
        wait_gone "$pid" 10 || { kill -KILL "$pid" && wait_gone "$pid" 5; }
    done
}

# -- images: Debian's packages on a base image, tagged by a digest of what they are made of ------------------------------

digest() {
    # But for the two files that run.sh and the manager write into balancer/.
    { echo "$LB_BASE_IMAGE"; find "$1" -type f ! -path '*/__pycache__/*' ! -name ip.txt ! -name hostip.txt | sort | xargs cat; } |
        sha256sum | cut -c1-12
}

# build_image FOLDER TAG: builds it unless it is there.
build_image() {
    if docker image inspect "$2" >/dev/null 2>&1; then return; fi
    find_base_image
    step "Building the ${1##*/} image" docker build --label "lbscaler.image=${1##*/}" --build-arg "BASE=$BASE" --tag "$2" "$1"
}

find_base_image() {
    local made
    made=lbscaler-base:debootstrap-trixie
    for BASE in "$LB_BASE_IMAGE" "$made"; do
        if docker image inspect "$BASE" >/dev/null 2>&1; then return; fi
    done
    BASE=$LB_BASE_IMAGE
    MAY_FAIL=1 step "Pulling $BASE" timeout 120 docker pull "$BASE" && return
    [ "$BASE" = debian:trixie-slim ] || die "the base image $BASE is neither here nor to be pulled"
    have debootstrap || need "making a base image without a registry" debootstrap
    step "Making the base image with debootstrap instead" make_base_image "$made"
    BASE=$made
}

make_base_image() {
    local tree
    tree=$(mktemp -d)
    debootstrap --variant=minbase trixie "$tree" && tar -C "$tree" -c . | docker import --change 'LABEL lbscaler.image=base' - "$1"
    local status=$?
    rm -rf "$tree"
    return "$status"
}

# ours ROLE: the ids of this project's containers in that role.
ours() { docker ps -aq --filter "label=lbscaler.project=$LB_PROJECT" --filter "label=lbscaler.role=$1"; }

# remove_check: what a run.sh that was killed left of its check of the kernel.
remove_check() { ours check | xargs -r docker rm -f >>"$LOG" 2>&1 || true; }

# curl without curl: the body of GET http://HOST:PORT PATH, status 0 only for 200.
http_get() {
    (
        exec 3<>"/dev/tcp/$1/$2" || exit 1
        printf 'GET %s HTTP/1.0\r\nHost: %s\r\n\r\n' "$3" "$1" >&3
        answer=$(timeout 5 cat <&3) || exit 1
        [[ "$answer" == HTTP/1.?\ 200* ]] && printf '%s\n' "${answer#*$'\r\n\r\n'}"
    ) 2>/dev/null
}
