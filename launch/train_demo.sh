#!/usr/bin/env bash
# Demo model 2, from nothing to a model file: synthetic shards, training, conversion.
#
#   ./launch/train_demo.sh [FOLDER] [flags of loki_jax.train ...]      FOLDER: runs/demo128 unless given
#
# Makes FOLDER/shards (skipped where they are), trains configs/demo128.py in FOLDER/train, and writes
# FOLDER/demo128.safetensors. Run the same command again to go on from the last checkpoint. Environment:
#   MINUTES      stop training after so long: a checkpoint is saved, and the model file holds what there is
#   CONFIG       another config, e.g. configs/demo128.py:flow
#   SIZE         of the shards' frames in pixels (128), at least that of CONFIG
#   IDENTITIES   people in the shards (2500, with 20 frames each)
#   LOKI_PYTHON  a Python that has the package's dependencies; otherwise .venv is made or reused
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$root/launch/setup.sh"
if [[ -z ${LOKI_PYTHON:-} ]]; then
    loki_setup "$root" demo
fi
folder=runs/demo128
if (($#)) && [[ $1 != -* ]]; then
    folder=$1
    shift
fi
cd "$root"

if [[ ! -f $folder/shards/dataset_info.json ]]; then
    "$LOKI_PYTHON" -m data_prep.synth --out "$folder/shards" --overwrite --seed 0 --size "${SIZE:-128}" \
        --identities "${IDENTITIES:-2500}" --clips-per-identity 1 --frames 20 --validation 0.01
fi

# SIGTERM makes the training save a checkpoint and end with 75, its code for an interruption.
limit=()
if [[ -n ${MINUTES:-} ]]; then
    limit=(timeout --signal=TERM --kill-after=120 "${MINUTES}m")
fi
code=0
${limit[@]+"${limit[@]}"} "$LOKI_PYTHON" -m loki_jax.train --config "${CONFIG:-configs/demo128.py}" --workdir "$folder/train" \
    --config.data.path="$folder/shards" "$@" || code=$?
# 124: `timeout` sent the signal.
if ((code != 0 && code != 75 && code != 124)); then
    exit "$code"
fi
exec "$LOKI_PYTHON" -m loki_jax.convert --workdir "$folder/train" --out "$folder/demo128.safetensors"
