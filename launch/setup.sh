# Sourced by demo.sh and test.sh: make or reuse .venv in the clone.
# shellcheck shell=bash

# usage: loki_setup ROOT PROFILE, where PROFILE is demo or test. Sets LOKI_PYTHON to .venv's Python.
# A stamp in .venv remembers what is installed, so that a second run takes no time.
loki_setup() {
    local root=$1 profile=$2
    local venv=$root/.venv extras
    case $profile in
        demo) extras=prep,eval ;;
        test) extras=prep,eval,identity,arcface,app,sign,test ;;
        *) echo "setup.sh: unknown profile $profile" >&2; return 2 ;;
    esac

    # Two set-ups at a time would spoil each other; the second waits.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
    fi
    _loki_setup_locked "$root" "$venv" "$profile" "$extras" || return
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
    LOKI_PYTHON=$venv/bin/python
    export LOKI_PYTHON
}

_loki_setup_locked() {
    local root=$1 venv=$2 profile=$3 extras=$4
    local python
    # A .venv whose Python does not start (clone moved, Python upgraded) or lacks pip is made anew.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(_loki_find_python) || return
        echo "set-up: making .venv with $("$python" --version)"
        if ! "$python" -m venv --clear "$venv"; then
            echo "set-up: $python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv." >&2
            return 1
        fi
    fi
    python=$venv/bin/python

    # Exact versions: one file for Python 3.11, one for newer ones. The link is for installing more by hand.
    local pins=constraints-3.13.txt
    if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
        pins=constraints.txt
    fi
    ln -sf "../$pins" "$venv/constraints.txt"
    pins=$root/$pins

    local stamp=$venv/.loki-setup-$profile wanted
    wanted=$(cat "$root/setup.py" "$root/pyproject.toml" "$pins" | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.argv[1].encode()).hexdigest())' \
        "$profile $root $("$python" --version)")
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return 0
    fi

    local pip=("$python" -m pip install --quiet --disable-pip-version-check -c "$pins")
    if [[ $profile == test ]]; then
        # First and by its exact version: asked for by another package, pip may choose a build with
        # several GB of CUDA libraries. pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS) lead to CPU builds.
        echo "set-up: installing torch (only the tests compare with it)"
        local torch
        torch=$(grep '^torch==' "$pins") || return
        "${pip[@]}" "$torch" || return
    fi
    echo "set-up: installing loki_jax[$extras] into .venv (some minutes the first time)"
    # setuptools warns of every editable installation; nothing to act on.
    PYTHONWARNINGS=ignore "${pip[@]}" -e "${root}[$extras]" || return
    echo "$wanted" >"$stamp"
}

_loki_find_python() {
    local candidate
    # 3.11 first: CI runs it.
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "set-up: needs Python >= 3.11, found none. Install it, or name one: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}
