#!/usr/bin/env bash
# All tests with one command, also on a bare machine. Installs what the tests need, starts a Docker Engine where none
# answers, runs the linters and all tests, says what was skipped and why, and stops what it started.
#   tests/run.sh            linters, then all tests: several at a time; those that failed once more, alone; then those
#                           marked paired, two at a time; then those marked serial, alone
#   tests/run.sh --fast     linters and the unit tests that are not marked slow; they need neither root nor an engine
#   tests/run.sh WORD…      linters, then one pytest process with these words; paths, such as tests/swarm, select tests
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=manager/host.sh
. manager/host.sh

mkdir -p run
LOG=run/tests.log
: >"$LOG"
VENV=.venv-tests
# Most tests wait more than they compute, so there are more of these than cores.
WORKERS=${LBTEST_WORKERS:-4}
FAST=''
# All processes find here what one of them has made.
LBTEST_SHARED=$(mktemp -d)
export LBTEST_SHARED
trap 'end_step; rm -rf "$LBTEST_SHARED"; [ -z "$ENGINE_STARTED" ] || stop_engine' EXIT

if [ "${1:-}" = --fast ]; then
    FAST=1
    shift
fi

install_packages() {
    python3 -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --require-hashes -r tests/requirements.txt
    sha256sum <tests/requirements.txt >"$VENV/stamp"
}

# tests/conftest.py says which tests stay together, and orders them, longest first, so xdist must not.
run_parallel() {
    "$VENV/bin/python" -m pytest -n "$WORKERS" --dist loadscope --no-loadscope-reorder --durations 20 "$@"
}

if [ -n "$FAST" ]; then
    have shellcheck || need "the linters" shellcheck
elif [ "$(id -u)" -eq 0 ] && have apt-get; then
    missing=()
    for pair in python3:python3 setpriv:util-linux shellcheck:shellcheck iptables:iptables ipset:ipset conntrack:conntrack ip:iproute2 sysctl:procps hey:hey git:git \
        curl:curl openssl:openssl promtool:prometheus chromium:chromium docker-registry:docker-registry; do
        have "${pair%%:*}" || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] || need "the tests" "${missing[@]}"
    ensure_engine
else
    say "Not root on a Debian or Ubuntu: tests that need namespaces or an engine will be skipped"
fi
python3 -c 'import ensurepip, venv' 2>/dev/null || need "the tests' environment" python3-venv
[ "$(cat $VENV/stamp 2>/dev/null)" = "$(sha256sum <tests/requirements.txt)" ] || step "Installing the tests' packages into $VENV" install_packages

say "ruff, mypy, import-linter, shellcheck, hadolint"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
PYTHONPATH=manager "$VENV/bin/lint-imports" --no-cache
git ls-files -co --exclude-standard -z '*.sh' .ci/run | xargs -0 shellcheck -x
"$VENV/bin/hadolint" balancer/Dockerfile server/Dockerfile docs/examples/*/*Dockerfile

[ -z "$ENGINE_STARTED" ] || [ ! -e run/engine/dockerd.pid ] || export LBTEST_OWN_ENGINE=1
all=(tests/unit tests/netns tests/browser tests/e2e tests/swarm)
if [ -n "$FAST" ]; then
    say "unit"
    run_parallel -m "not slow" tests/unit "$@"
elif [ $# -gt 0 ]; then
    case " $* " in *" tests/"*) all=() ;; esac
    "$VENV/bin/python" -m pytest "${all[@]}" "$@"
else
    say "unit, netns, browser, e2e, swarm: $WORKERS at a time"
    status=0
    run_parallel -m "not paired and not serial" "${all[@]}" || status=$?
    [ "$status" -le 1 ] || exit "$status" # 1: some tests failed; above: pytest was interrupted, or could not start
    if [ "$status" -eq 1 ]; then
        # On a busy machine a test may miss a deadline that it meets alone. A test that fails twice has found a defect.
        say "the tests that failed, once more, one after another"
        status=0
        "$VENV/bin/python" -m pytest --last-failed --last-failed-no-failures none "${all[@]}" || status=$?
        [ "$status" -le 1 ] || exit "$status"
    fi
    say "the tests that need processor time and mostly wait: one with engines of its own and one other at a time"
    WORKERS=2 run_parallel -m paired "${all[@]}" || status=$?
    say "the tests that need the machine for themselves, one after another"
    "$VENV/bin/python" -m pytest -m serial "${all[@]}" || status=$?
    exit "$status"
fi
