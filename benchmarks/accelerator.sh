#!/usr/bin/env bash
# What only an accelerator can show: `./benchmarks/accelerator.sh [flags]`, described in accelerator.py.
# LOKI_PYTHON names a Python that has the package's dependencies; nothing is installed.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
exec "${LOKI_PYTHON:-python3}" benchmarks/accelerator.py "$@"
