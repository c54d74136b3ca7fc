#!/usr/bin/env bash
# All tests with one command, on a bare machine too: installs what they need, starts an engine where none answers, checks
# and runs everything, says what was skipped and why, and ends what it started. Words given go to pytest; those that name
# tests, such as tests/swarm, are run alone.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=manager/host.sh
. manager/host.sh

mkdir -p run
LOG=run/tests.log
: >"$LOG"
VENV=.venv-tests
ENGINE_STARTED=
trap 'end_step; [ -z "$ENGINE_STARTED" ] || stop_engine' EXIT

install_packages() {
    python3 -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --require-hashes -r tests/requirements.txt
    sha256sum <tests/requirements.txt >"$VENV/stamp"
}

if [ "$(id -u)" -eq 0 ] && have apt-get; then
    missing=()
    for pair in python3:python3 setpriv:util-linux shellcheck:shellcheck iptables:iptables ipset:ipset conntrack:conntrack ip:iproute2 sysctl:procps hey:hey git:git \
        curl:curl openssl:openssl promtool:prometheus chromium:chromium docker-registry:docker-registry; do
        have "${pair%%:*}" || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] || need "the tests" "${missing[@]}"
    ensure_engine
else
    say "Not root on a Debian or Ubuntu: what needs namespaces or an engine will be skipped"
fi
python3 -c 'import ensurepip, venv' 2>/dev/null || need "the tests' environment" python3-venv
[ "$(cat $VENV/stamp 2>/dev/null)" = "$(sha256sum <tests/requirements.txt)" ] || step "Installing the tests' packages into $VENV" install_packages

say "ruff, mypy, shellcheck, hadolint"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
PYTHONPATH=manager "$VENV/bin/lint-imports" --no-cache
git ls-files -co --exclude-standard -z '*.sh' .ci/run | xargs -0 shellcheck -x
"$VENV/bin/hadolint" balancer/Dockerfile server/Dockerfile

say "unit, netns, browser, e2e, swarm"
[ -z "$ENGINE_STARTED" ] || [ ! -e run/engine/dockerd.pid ] || export LBTEST_OWN_ENGINE=1
tests=(tests/unit tests/netns tests/browser tests/e2e tests/swarm)
case " $* " in *" tests/"*) tests=() ;; esac
"$VENV/bin/python" -m pytest "${tests[@]}" "$@"
