"""The benchmarks of training reach their bounds, in their quickest form."""

import subprocess
import sys

import pytest

from benchmarks import disk_full, resume, topologies
from tests.training.tiny_run import environment


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    result = resume.measure(tmp_path, resume.MODES[:2], 2, 1, 30, environment(tmp_path / "cache"))
    assert result["identical"] == 2, result


@pytest.mark.slow
def test_a_run_whose_partner_is_killed_resumes_bit_for_bit(tmp_path):
    result = resume.measure(tmp_path, ["one-of-two"], 1, 2, 30, environment(tmp_path / "cache"))
    assert result["identical"] == 1 and result["kills"] == 2, result


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    command = [sys.executable, disk_full.__file__, "--runs", "2"]
    done = subprocess.run(command, env=environment(tmp_path / "cache"), capture_output=True, text=True)
    if done.returncode == 69:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    result = topologies.measure(tmp_path, topologies.QUICK, 3, tmp_path / "cache")
    assert result["within_bounds"] and result["restored_pairs"] == 2, result
