#!/usr/bin/env bash
# The tests.
#
#   ./launch/test.sh                      all but those marked slow
#   ./launch/test.sh --setup              only make .venv
#   ./launch/test.sh tests/head -k skin   any arguments of pytest
#   ./launch/test.sh -m slow              the slow ones
#
# Needs Python >= 3.11 with pip, nothing else.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$root/launch/setup.sh"

setup_only=false
arguments=()
for argument in "$@"; do
    case $argument in
        --setup) setup_only=true ;;
        *) arguments+=("$argument") ;;
    esac
done

loki_setup "$root" test
if $setup_only; then
    exit 0
fi
cd "$root"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Compiled programs are kept between runs: most of the tests' time is compilation.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$root/.venv/jax-cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# Two processes, each with whole files, so that a file's fixtures are made once.
exec "$LOKI_PYTHON" -m pytest -q -n 2 --dist loadfile --durations 15 ${arguments[@]+"${arguments[@]}"}
