# shellcheck shell=bash
# The common beginning of tests/bench/run.sh and tests/chaos/run.sh, which source it in the root of the checkout.
# shellcheck source=manager/host.sh
. manager/host.sh
from=$OLDPWD # where the command was called: paths in its arguments are relative to it

# begin_program NAME PURPOSE MODULE PROGRAM:PACKAGE… -- ARGUMENT…
# Writes its log to run/NAME.log, installs Python and the programs, starts an engine where none answers, and makes .venv.
# With --report or --help among the arguments, runs MODULE in the folder `from` instead: that needs none of these.
begin_program() {
    local purpose=$2 module=$3 pairs=() pair
    LOG=run/$1.log
    mkdir -p run
    : >"$LOG"
    root=$PWD
    trap 'cd "$root"; end_step; [ -z "${ENGINE_STARTED:-}" ] || stop_engine' EXIT
    shift 3
    while [ "$1" != -- ]; do pairs+=("$1") && shift; done
    shift
    have python3 || need "$purpose" python3
    case " $* " in
        *" --report "* | *" --help "*) cd "$from" && exec python3 -m "$module" "$@" ;;
    esac
    for pair in "${pairs[@]}"; do
        have "${pair%%:*}" || need "$purpose" "${pair#*:}"
    done
    ensure_engine
    make_venv
}
