"""Compiled programs are kept between runs, in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def enable_compile_cache() -> None:
    """Let jax store every program that it compiles, and read it in later runs.

    Small programs count: an animation compiles two hundred of them before its first frame. The folder is
    JAX_COMPILATION_CACHE_DIR where it is set (empty: no cache), else `loki_jax` in XDG_CACHE_HOME or
    ~/.cache. Programs call this before they compile anything.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loki_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
