"""Compiled programs are found again by a second process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from loki_jax.compile_cache import enable_compile_cache
enable_compile_cache()
import jax
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


def run_program(environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    inherited |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=inherited | environment, check=True)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("JAX_COMPILATION_CACHE_DIR", "."), ("XDG_CACHE_HOME", "loki_jax"), ("HOME", ".cache/loki_jax")],
)
def test_compiled_programs_are_stored_where_the_user_says(tmp_path, variable, folder):
    others = {"XDG_CACHE_HOME": ""} if variable == "HOME" else {"HOME": str(tmp_path / "home")}
    run_program(others | {variable: str(tmp_path)})
    stored = sorted((tmp_path / folder).glob("*-cache"))
    assert stored
    run_program(others | {variable: str(tmp_path)})
    assert sorted((tmp_path / folder).glob("*-cache")) == stored


def test_an_empty_folder_name_turns_the_cache_off(tmp_path):
    run_program({"JAX_COMPILATION_CACHE_DIR": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": ""})
    assert not list(tmp_path.rglob("*-cache"))
