# Sourced by what starts training on several GPUs: sets XLA_FLAGS (docs/scaling.md). Flags that XLA_FLAGS already
# holds come last, and the last of two counts.
# shellcheck shell=bash

# Collectives beside computation instead of between; sums of gradients in parts of 128 MiB instead of 30 MB.
_loki_combine=$((128 << 20))
XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true\
 --xla_gpu_all_reduce_combine_threshold_bytes=$_loki_combine\
 --xla_gpu_all_gather_combine_threshold_bytes=$_loki_combine\
 --xla_gpu_reduce_scatter_combine_threshold_bytes=$_loki_combine${XLA_FLAGS:+ $XLA_FLAGS}"
export XLA_FLAGS
