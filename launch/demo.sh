#!/usr/bin/env bash
# The demo: synthetic shards, training steps, cross-identity animation of held-out identities, evaluation.
#
#   ./launch/demo.sh                 everything; results in demo_out/
#   ./launch/demo.sh --from-scratch  train from nothing instead of from the shipped model
#   ./launch/demo.sh --setup         only make .venv
#
# Needs Python >= 3.11 with pip, nothing else. Other arguments go to `python -m loki_jax.demo`.
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

loki_setup "$root" demo
if $setup_only; then
    exit 0
fi
cd "$root"
exec "$LOKI_PYTHON" -m loki_jax.demo --out demo_out ${arguments[@]+"${arguments[@]}"}
