#!/usr/bin/env bash
# N training processes on this machine: one for each GPU, or on the CPU.
#
#   ./launch/multiprocess.sh [options] -- ARGUMENTS OF loki_jax.train
#   ./launch/multiprocess.sh -- --config configs/hdtf.py --workdir runs/hdtf --config.data.path=SHARDS
#   ./launch/multiprocess.sh --cpu -n 2 -- --config configs/demo.py --workdir runs/demo --config.data.path=shards
#
#   -n N            processes (default: one for each GPU; on the CPU 2)
#   --cpu, --gpu    where they run (default: GPUs, if nvidia-smi lists any)
#   --devices D     simulated devices of each process, with --cpu (default 1)
#   --port P        of the coordinator (default: a free one)
#   --dry-run       print what each process would run, and stop
#
# CUDA_VISIBLE_DEVICES chooses among the GPUs. Lines are marked with the number of their process. SIGTERM
# and Ctrl-C are passed on: the run saves and ends, and the same command goes on. When a process fails,
# the others get 60 s to end (LOKI_GRACE), then they are killed. The exit code is that of the first to fail.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
    echo "multiprocess.sh: $1" >&2
    sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
    exit 64
}

count='' place='' devices=1 port='' dry_run=false
while [[ $# -gt 0 ]]; do
    case $1 in
        -n | --devices | --port) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$1 needs a number" ;;&
        -n) count=$2; shift 2 ;;
        --devices) devices=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        --cpu | --gpu) place=${1#--}; shift ;;
        --dry-run) dry_run=true; shift ;;
        --) shift; break ;;
        *) usage "unknown option $1 (arguments of loki_jax.train come after --)" ;;
    esac
done
[[ $# -gt 0 ]] || usage "no arguments for loki_jax.train after --"

gpus=()
if [[ $place != cpu ]] && command -v nvidia-smi >/dev/null; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        while read -r index; do
            gpus+=("$index")
        done < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
    fi
fi
if [[ -z $place ]]; then
    if [[ ${#gpus[@]} -gt 0 ]]; then place=gpu; else place=cpu; fi
fi
if [[ $place == gpu ]]; then
    count=${count:-${#gpus[@]}}
    if [[ $count -eq 0 || $count -gt ${#gpus[@]} ]]; then
        echo "multiprocess.sh: $count processes want a GPU each, found ${#gpus[@]}. Give -n, or --cpu." >&2
        exit 69
    fi
else
    count=${count:-2}
fi

python=${LOKI_PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python ]] && ! command -v "$python" >/dev/null; then
    echo "multiprocess.sh: $python: no such Python. Run ./launch/demo.sh --setup, or name one in LOKI_PYTHON." >&2
    exit 69
fi
if [[ -z $port ]]; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
fi

# The environment and the command of process $1, in `command`.
command_of() {
    if [[ $place == gpu ]]; then
        command=(env "CUDA_VISIBLE_DEVICES=${gpus[$1]}" "XLA_FLAGS=$XLA_FLAGS")
    else
        command=(env JAX_PLATFORMS=cpu)
        if [[ $devices -gt 1 ]]; then
            command+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
        fi
    fi
    command+=("$python" -m loki_jax.train "${arguments[@]}")
    command+=(--coordinator "localhost:$port" --processes "$count" --process_id "$1")
}

arguments=("$@")
if [[ $place == gpu ]]; then
    # shellcheck source-path=SCRIPTDIR source=xla_flags.sh
    source "$root/launch/xla_flags.sh"
fi
if $dry_run; then
    for ((i = 0; i < count; i++)); do
        command_of "$i"
        printf 'process %d:' "$i"
        printf ' %q' "${command[@]}"
        echo
    done
    exit 0
fi

# Lines, each at once, with the number of their process (sed would hold them back).
mark() {
    local line
    trap '' INT TERM  # says what the process says while it ends
    while IFS= read -r line || [[ -n $line ]]; do
        printf '[%d] %s\n' "$1" "$line"
    done
}

cd "$root"
stop=false pids=()
trap 'stop=true' INT TERM
# A process group for each process: Ctrl-C reaches this script alone, which passes it on once.
set -m
for ((i = 0; i < count; i++)); do
    command_of "$i"
    "${command[@]}" > >(mark "$i") 2>&1 &
    pids+=($!)
done
set +m

code=0 grace=${LOKI_GRACE:-60} deadline=''
while [[ ${#pids[@]} -gt 0 ]]; do
    if $stop; then
        echo "multiprocess.sh: asked to stop; the run saves and ends" >&2
        kill -TERM "${pids[@]}" 2>/dev/null || true
        stop=false
    fi
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if [[ $status -ne 0 && $code -eq 0 ]]; then
            code=$status deadline=$((SECONDS + grace))
            echo "multiprocess.sh: a process ended with code $code" >&2
        fi
    done
    pids=(${running[@]+"${running[@]}"})
    if [[ -n $deadline && $SECONDS -ge $deadline && ${#pids[@]} -gt 0 ]]; then
        echo "multiprocess.sh: the others do not end by themselves; killing them" >&2
        kill -KILL "${pids[@]}" 2>/dev/null || true
        deadline=''
    fi
    if [[ ${#pids[@]} -gt 0 ]]; then
        sleep 0.3 || true
    fi
done
exit "$code"
