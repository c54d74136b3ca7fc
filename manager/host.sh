# shellcheck shell=bash
# What run.sh, stop.sh and tests/run.sh share: steps, packages, and starting and stopping the Docker Engine.
# Sourced with the repository's root as the working directory. LOG is the file that steps write to.

ENGINE_DIR=run/engine
TICKER='' # process id of what prints that a step still runs

# A reader that went away is no reason to stop half way.
say() { printf '%s\n' "$*" 2>/dev/null || true; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# open_streams: a closed standard stream becomes /dev/null; else the next file that is opened would take its place.
open_streams() {
    true 9>&2 || exec 2>/dev/null
    { true 9<&0; } 2>/dev/null || exec </dev/null
    { true 9>&1; } 2>/dev/null || exec >/dev/null
}

# step TEXT COMMAND…: prints TEXT, runs COMMAND with its output in LOG, prints how long it took. A failure ends the script.
step() {
    local text=$1 began=$SECONDS status=0
    shift
    printf '%s … ' "$text" 2>/dev/null || true
    tick 8>&- & # it may outlive the step for a moment, and must not keep the lock of make_venv
    TICKER=$!
    "$@" >>"$LOG" 2>&1 </dev/null || status=$?
    end_step
    if [ "$status" -ne 0 ]; then
        say "failed"
        { echo "--- the end of $LOG:"; tail -n 15 "$LOG"; echo "---"; } >&2
        die "$text: failed with status $status"
    fi
    say "$((SECONDS - began)) s"
}

tick() {
    local seconds=0
    while sleep 5 >/dev/null 2>&1; do
        seconds=$((seconds + 5))
        printf '%d s … ' "$seconds"
    done
}

end_step() {
    [ -z "$TICKER" ] || kill "$TICKER" 2>/dev/null || true
    TICKER=''
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }
}

# need PURPOSE PACKAGE…: installs Debian packages, or prints what is missing where it may not.
need() {
    local purpose=$1
    shift
    [ -z "${NO_INSTALL:-}" ] || die "missing for $purpose: $*; install it, or leave --no-install out"
    [ "$(id -u)" -eq 0 ] || die "missing for $purpose: $*; install it, or run as root"
    have apt-get || die "missing for $purpose: $*; no apt-get here to install it with"
    step "Installing $* ($purpose)" apt_install "$@"
}

# make_venv: all projects share .venv, and their managers run from it.
make_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || [ "$(venv_stamp)" = "$(wanted_stamp)" ] ||
        need "the manager's environment" python3-venv
    exec 8>run/venv.lock
    flock -n 8 || { say "Waiting for another run.sh, which installs the manager's packages" && flock 8; }
    [ "$(venv_stamp)" = "$(wanted_stamp)" ] || step "Installing the manager's packages into .venv" install_venv
    exec 8>&-
}

venv_stamp() { cat .venv/stamp 2>/dev/null || true; }
wanted_stamp() { sha256sum <manager/requirements.txt; }

# install_venv: makes a new environment beside the one in use, which it replaces once it is complete.
install_venv() {
    [ -e .venv ] || [ ! -e .venv.old ] || mv .venv.old .venv # a replacement that was interrupted
    rm -rf .venv.new .venv.old
    python3 -m venv .venv.new || return
    .venv.new/bin/python -m pip install --require-hashes --only-binary :all: -r manager/requirements.txt || return
    wanted_stamp >.venv.new/stamp || return
    [ ! -e .venv ] || mv -T .venv .venv.old
    mv -T .venv.new .venv && rm -rf .venv.old
}

engine_answers() { timeout 10 docker info >/dev/null 2>&1; }

# ensure_engine: uses the engine that answers, else starts the installed one, else installs and starts Debian's.
# ENGINE_STARTED is 1 when it was started here, else empty.
ensure_engine() {
    export ENGINE_STARTED=
    case "${DOCKER_HOST:-unix:}" in unix:*) ;; *) die "DOCKER_HOST is $DOCKER_HOST; the engine has to be on this host" ;; esac
    if have docker && engine_answers; then return; fi
    [ -z "${DOCKER_HOST:-}" ] || die "no engine answers at DOCKER_HOST=$DOCKER_HOST"
    have dockerd || need "running containers" docker.io iptables
    have docker || need "controlling the engine" docker-cli
    [ "$(id -u)" -eq 0 ] || die "no engine answers this user; start it, or join the docker group, or run as root"
    ENGINE_STARTED=1 # before it starts, so that an interrupt stops it
    step "Starting the Docker Engine" start_engine
}

# start_engine [FLAG…]: flags for dockerd, where there is no systemd. It tries again, because an engine that was just
# killed may still hold what the next one needs.
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

# stop_engine: stops the engine that start_engine started, and no other.
stop_engine() {
    local pid tries
    pid=$(cat "$ENGINE_DIR/dockerd.pid" 2>/dev/null) || return 0
    if [ "$pid" = systemd ]; then
        systemctl stop docker docker.socket
    elif is_dockerd "$pid"; then # and not another process with a reused number
        kill -TERM "$pid"
        for ((tries = 0; tries < 300; tries++)); do
            is_dockerd "$pid" || break
            sleep 0.1
        done
    fi
    rm -rf "$ENGINE_DIR"
}

is_dockerd() { tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF dockerd; }

# run_module PYTHON MODULE ARGUMENT…: runs one of the manager's Python modules.
run_module() { PYTHONPATH=manager "$1" -m "${@:2}"; }
