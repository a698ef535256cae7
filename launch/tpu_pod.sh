#!/usr/bin/env bash
# Training on a slice of TPU VMs: the same command on every worker, through gcloud.
#
#   ./launch/tpu_pod.sh setup NAME --zone ZONE                 copy this clone's HEAD and install it
#   ./launch/tpu_pod.sh train NAME --zone ZONE -- ARGUMENTS OF loki_jax.train
#   ./launch/tpu_pod.sh watch NAME --zone ZONE                 follow the log of worker 0
#   ./launch/tpu_pod.sh stop NAME --zone ZONE                  save and end
#
#   --project P     gcloud's project, where it is not the default
#   --dry-run       print the gcloud commands and what each worker would run
#   --workers N     how many workers --dry-run shows (default 4; gcloud asks the slice itself)
#
# On the workers `train` runs `tpu_pod.sh worker-train ARGUMENTS`: it detaches from the connection, logs to
# ~/loki_jax/train.log, and starts again after code 69 (a process was lost), 75 (preempted) or a signal, up to
# 100 times (LOKI_MAX_RESTARTS). `stop` runs `worker-stop`. Workers find each other through the TPU's metadata. Workdir
# and shards must lie on a disk that all workers see (Filestore, or a mounted bucket).
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
    echo "tpu_pod.sh: $1" >&2
    sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
    exit 64
}

# ------------------------------------------------------------------------------------ on a worker
cd_root() { cd "$root" || exit 66; }

running() { [[ -e train.pid ]] && kill -0 "$(<train.pid)" 2>/dev/null; }

case ${1:-} in
    worker-train)
        shift
        cd_root
        if running; then
            echo "tpu_pod.sh: already training here (process $(<train.pid)); stop it first" >&2
            exit 75
        fi
        setsid nohup "${BASH_SOURCE[0]}" worker-loop "$@" >>train.log 2>&1 </dev/null &
        echo $! >train.pid
        exit 0
        ;;
    worker-stop)
        cd_root
        if ! running; then
            echo "tpu_pod.sh: not training here" >&2
            exit 0
        fi
        kill -TERM "$(<train.pid)"
        exit 0
        ;;
    worker-loop)
        shift
        cd_root
        stop=false child=''
        trap 'stop=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
        for ((start = 0; start <= ${LOKI_MAX_RESTARTS:-100}; start++)); do
            "${LOKI_PYTHON:-$root/.venv/bin/python}" -m loki_jax.train --distributed "$@" &
            child=$! code=0
            wait "$child" || code=$?
            # A signal ends `wait` before the child: wait again for its own code.
            while kill -0 "$child" 2>/dev/null; do
                code=0
                wait "$child" || code=$?
            done
            echo "tpu_pod.sh: $(date -Is) code $code"
            if $stop || [[ $code -ne 69 && $code -ne 75 && $code -le 128 ]]; then
                exit "$code"
            fi
            child=''
            sleep "${LOKI_RESTART_WAIT:-20}"
        done
        exit "$code"
        ;;
esac

# ---------------------------------------------------------------------------- on your own machine
action=${1:-} name=${2:-} zone='' workers=4 dry_run=false place=()
case $action in
    setup | train | watch | stop) ;;
    *) usage "the first argument is setup, train, watch or stop" ;;
esac
[[ -n $name && $name != -* ]] || usage "$action needs the name of the TPU"
shift 2
while [[ $# -gt 0 ]]; do
    case $1 in
        --zone | --project | --workers) [[ -n ${2:-} ]] || usage "$1 needs a value" ;;&
        --zone) zone=$2; shift 2 ;;
        --project) place+=(--project "$2"); shift 2 ;;
        --workers) workers=$2; shift 2 ;;
        --dry-run) dry_run=true; shift ;;
        --) shift; break ;;
        *) usage "unknown option $1 (arguments of loki_jax.train come after --)" ;;
    esac
done
[[ -n $zone ]] || usage "--zone is missing"
place+=(--zone "$zone")
if [[ $action == train ]]; then
    [[ $# -gt 0 ]] || usage "no arguments for loki_jax.train after --"
else
    [[ $# -eq 0 ]] || usage "$action takes no arguments after --"
fi

# A command as it can be typed; whole commands for another shell stay readable in single quotes.
show() {
    local word line=''
    for word in "$@"; do
        if [[ $word == *[![:alnum:]_./:=,+@-]* && $word != *\'* ]]; then
            line+=" '$word'"
        else
            line+=" $(printf %q "$word")"
        fi
    done
    echo "${line# }"
}

run() {
    if $dry_run; then show "$@"; else "$@"; fi
}

# on WORKER COMMAND: the shell command on one worker or on all.
on() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
    if $dry_run; then
        local last=0 i
        if [[ $1 == all ]]; then last=$((workers - 1)); fi
        for ((i = 0; i <= last; i++)); do
            echo "worker $i: $2"
        done
    fi
}

case $action in
    setup)
        if ! $dry_run && [[ -n $(git -C "$root" status --porcelain) ]]; then
            echo "tpu_pod.sh: uncommitted changes stay here; HEAD is copied" >&2
        fi
        scratch=$(mktemp -d)
        trap 'rm -rf -- "$scratch"' EXIT
        run git -C "$root" archive --format=tar.gz --output="$scratch/loki_jax.tar.gz" HEAD
        run gcloud compute tpus tpu-vm scp "$scratch/loki_jax.tar.gz" "$name:loki_jax.tar.gz" "${place[@]}" --worker=all
        # launch/setup.sh finds a Python and makes .venv; libtpu comes with the tpu extra.
        on all 'set -e; mkdir -p loki_jax && tar -xzf loki_jax.tar.gz -C loki_jax && cd loki_jax && ./launch/demo.sh --setup && .venv/bin/python -m pip install --quiet -c .venv/constraints.txt -e ".[tpu]"'
        ;;
    train)
        on all "cd loki_jax && ./launch/tpu_pod.sh worker-train$(printf ' %q' "$@")"
        ;;
    watch)
        on 0 'tail -n 50 -F loki_jax/train.log'
        ;;
    stop)
        on all 'cd loki_jax && ./launch/tpu_pod.sh worker-stop'
        ;;
esac
