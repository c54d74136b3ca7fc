# shellcheck shell=bash
# Functions that run.sh, stop.sh and tests/run.sh share: steps, packages, and starting and stopping the Docker Engine.
# Source it with the repository's root as the working directory. LOG is the file that steps write to.

ENGINE_DIR=run/engine
ENGINE_TIMEOUT=60 # seconds for an engine to answer after its start, and to end
BOOT_ID=/proc/sys/kernel/random/boot_id
SYSTEMD=/run/systemd/system # exists if systemd is this host's init
ENGINE_STARTED='' # whatever the caller's environment has: another program's engine is not ours to stop
export DOCKER_CONTEXT=default # the manager uses the engine of this host, so the docker command must not use another one
TICKER='' # id of the background process that prints the seconds while a step runs

# say: prints a line. A closed standard output must not end the script in the middle of its work.
say() { printf '%s\n' "$*" 2>/dev/null || true; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# open_streams: opens each closed standard stream as /dev/null. Otherwise the next file that is opened would get its
# number, and output meant for the terminal would be written into that file.
open_streams() {
    true 9>&2 || exec 2>/dev/null
    { true 9<&0; } 2>/dev/null || exec </dev/null
    { true 9>&1; } 2>/dev/null || exec >/dev/null
}

# step TEXT COMMAND…: prints TEXT, runs COMMAND with its output in LOG, and prints the duration. If COMMAND fails, it
# prints the end of LOG and ends the script.
step() {
    local text=$1 began=$SECONDS status=0
    shift
    printf '%s … ' "$text" 2>/dev/null || true
    tick 8>&- & # without descriptor 8: it may live longer than the step, and must not keep the lock of make_venv
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

# apt_install PACKAGE…: updates the package lists only if the installation fails, because that is slow.
apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends "$@" ||
        { apt-get update && apt-get install -y --no-install-recommends "$@"; }
}

# need PURPOSE PACKAGE…: installs Debian packages. Ends the script with the missing names if it may not install.
need() {
    local purpose=$1
    shift
    [ -z "${NO_INSTALL:-}" ] || die "missing for $purpose: $*; install it, or leave --no-install out"
    [ "$(id -u)" -eq 0 ] || die "missing for $purpose: $*; install it, or run as root"
    have apt-get || die "missing for $purpose: $*; no apt-get here to install it with"
    step "Installing $* ($purpose)" apt_install "$@"
}

# make_venv: makes .venv if the requirements or the version of Python have changed. All projects share it, hence the
# lock.
make_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || [ "$(venv_stamp)" = "$(wanted_stamp)" ] ||
        need "the manager's environment" python3-venv
    exec 8>run/venv.lock
    flock -n 8 || { say "Waiting for another run.sh, which installs the manager's packages" && flock 8; }
    [ "$(venv_stamp)" = "$(wanted_stamp)" ] || step "Installing the manager's packages into .venv" install_venv
    exec 8>&-
}

venv_stamp() { cat .venv/stamp 2>/dev/null || true; }
wanted_stamp() { python3 -c 'import sys; print(*sys.version_info[:2])' && sha256sum <manager/requirements.txt; }

# install_venv: makes a new environment and, once it is complete, puts it in the place of the one in use.
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

# ensure_engine: if no engine answers, starts the installed one; if none is installed, installs Debian's first.
# Sets ENGINE_STARTED to 1 if it started the engine, else to the empty string.
ensure_engine() {
    export ENGINE_STARTED=
    case "${DOCKER_HOST:-unix:}" in
        unix:*) ;;
        *) die "DOCKER_HOST is $DOCKER_HOST; the engine has to be on this host" ;;
    esac
    if have docker && engine_answers; then return; fi
    # Docker 29.0 refuses the commands of versions before 25, and new commands refuse old engines.
    case "$(timeout 10 docker version 2>&1 || true)" in
        *"is too "[on]*) die "the docker command and the engine are too different versions; upgrade the older one" ;;
    esac
    [ -z "${DOCKER_HOST:-}" ] || die "no engine answers at DOCKER_HOST=$DOCKER_HOST"
    have dockerd || need "running containers" docker.io iptables
    have docker || need "controlling the engine" docker-cli
    [ "$(id -u)" -eq 0 ] || die "no engine answers this user; start it, or join the docker group, or run as root"
    step "Starting the Docker Engine" start_engine
}

# start_engine [FLAG…]: starts the engine through systemd, or without systemd as dockerd with the flags, and waits until
# it answers. ENGINE_DIR/dockerd.pid exists afterwards if this has started it. A dockerd that ends is started up to
# three times, because an engine that was just killed may still hold files and sockets that the next one needs.
start_engine() {
    local deadline=$((SECONDS + ENGINE_TIMEOUT)) pid tries
    mkdir -p "$ENGINE_DIR"
    if [ -d "$SYSTEMD" ] && start_service; then
        wait_for_engine "$deadline" $$ && return
        echo "docker does not answer after $ENGINE_TIMEOUT s; see journalctl -u docker"
        return 1
    fi
    pid=$(cat "$ENGINE_DIR/dockerd.pid" 2>/dev/null || true)
    if [ -n "$pid" ] && is_dockerd "$pid"; then # of an earlier run; a second one beside it could not start
        wait_for_engine "$deadline" "$pid" && return
        echo "dockerd (pid $pid) does not answer after $ENGINE_TIMEOUT s"
        return 1
    fi
    for tries in 1 2 3; do
        setsid dockerd "$@" >>"$ENGINE_DIR/dockerd.log" 2>&1 </dev/null &
        pid=$!
        mark_engine "$pid"
        if wait_for_engine "$deadline" "$pid"; then return; fi
        if kill -0 "$pid" 2>/dev/null; then break; fi # too slow; a second one beside it could not start
        sleep "$tries"
    done
    tail -n 15 "$ENGINE_DIR/dockerd.log"
    return 1
}

# start_service: an engine that ran before, but was too busy to answer, is not ours to stop.
start_service() {
    local state
    state=$(systemctl is-active docker) || true
    case $state in inactive | failed) mark_engine systemd ;; esac
    systemctl start docker
}

# mark_engine PID|systemd: this starts the engine. Marked before the start is complete, an interrupted one is undone.
mark_engine() {
    ENGINE_STARTED=1
    echo "$1" >"$ENGINE_DIR/dockerd.pid"
    cat "$BOOT_ID" >"$ENGINE_DIR/boot"
}

# wait_for_engine DEADLINE PID: fails at the deadline, or when the process has ended.
wait_for_engine() {
    until engine_answers; do
        [ "$SECONDS" -lt "$1" ] && kill -0 "$2" 2>/dev/null || return 1
        sleep 0.1
    done
}

# stop_engine: stops the engine if start_engine has started it since the host was booted.
stop_engine() {
    local pid deadline=$((SECONDS + ENGINE_TIMEOUT))
    pid=$(cat "$ENGINE_DIR/dockerd.pid" 2>/dev/null) || return 0
    if [ "$(cat "$ENGINE_DIR/boot" 2>/dev/null)" != "$(cat "$BOOT_ID")" ]; then
        : # that engine ended with the host
    elif [ "$pid" = systemd ]; then
        systemctl stop docker docker.socket
    elif is_dockerd "$pid"; then # another process may have the number by now
        kill -TERM "$pid"
        while is_dockerd "$pid"; do
            if [ "$SECONDS" -ge "$deadline" ]; then
                say "dockerd (pid $pid) has not ended after $ENGINE_TIMEOUT s"
                return 1
            fi
            sleep 0.1
        done
    fi
    rm -rf "$ENGINE_DIR"
}

# stop_unused_engine: the same after a failure, unless somebody else uses the engine by now.
stop_unused_engine() {
    if [ -n "$(timeout 10 docker ps --quiet 2>/dev/null)" ]; then
        say "The Docker Engine stays, because containers run on it"
    else
        stop_engine
    fi
}

is_dockerd() { tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF dockerd; }

# run_module PYTHON MODULE ARGUMENT…: runs one of the manager's Python modules.
run_module() { PYTHONPATH=manager "$1" -m "${@:2}"; }
